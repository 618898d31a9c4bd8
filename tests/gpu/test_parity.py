"""The engine on a GPU says what transformers says."""

import hf_checkpoints as hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ellm_jax import SamplingParams
from ellm_jax.checkpoint import load_model
from ellm_jax.models.decoder import Decoder
from ellm_jax.models.xla_ops import XlaOps

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# Chunks are 2 MiB on a GPU, so a request of 256 tokens takes 8 MiB; 64 MiB are XLA's rounding.
MEMORY = "192MiB"
LOGPROB_TOLERANCE = 1e-3


def greedy(tokens: int, **more: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **more)


@pytest.mark.parametrize("name", hf.CASES)
def test_float32_gives_the_stored_answers(name, tmp_path, make_engine, device):
    engine = make_engine(
        hf.make_checkpoint(tmp_path, name), device=device, dtype="float32", device_memory=MEMORY
    )
    expected = hf.expectations(name)
    # All at once, so that prompts are cut and batches are mixed.
    params = greedy(hf.NEW_TOKENS, logprobs=0)
    outputs = engine.generate([e.prompt for e in expected], params)
    for e, output in zip(expected, outputs, strict=True):
        what = f"{name}, seed {hf.CASES[name].seed}, prompt of {len(e.prompt)}"
        assert list(output.token_ids) == e.tokens, what
        told = [entry.logprob for entry in output.outputs[0].logprobs or ()]
        worst = np.abs(np.array(told) - np.array(e.logprobs)).max()
        assert worst <= LOGPROB_TOLERANCE, f"{what}: logprobs differ by {worst}"


def test_pressure_changes_no_answer_in_float32(tmp_path, make_engine, device):
    """Requests that take turns in a pool for a few of them, beside each other and cut in pieces."""
    path = hf.make_checkpoint(tmp_path, "llama")
    engine = make_engine(
        path, device=device, dtype="float32", device_memory="112MiB", max_num_seqs=16
    )
    expected = hf.expectations("llama") * 8
    outputs = engine.generate([e.prompt for e in expected], greedy(hf.NEW_TOKENS))
    for e, output in zip(expected, outputs, strict=True):
        assert list(output.token_ids) == e.tokens


def reference_logprobs(model: Decoder, ids: list[int]) -> np.ndarray:
    """After each token but the last, of the next one: in float32, on the CPU, of these weights."""
    cpu = jax.devices("cpu")[0]
    params = {
        name: jax.device_put(np.asarray(param).astype(np.float32), cpu)
        for name, param in model.named_params().items()
    }
    exact = Decoder.from_params(model.config, params)
    tokens = jax.device_put(np.array(ids, np.int32), cpu)
    with jax.default_device(cpu):
        hidden, _ = exact(tokens, jnp.arange(len(ids)), XlaOps(), None)
        logprobs = jax.nn.log_softmax(exact.logits(hidden, XlaOps()))
    return np.asarray(logprobs)[np.arange(len(ids) - 1), ids[1:]]


def engine_logprobs(engine, ids: list[int]) -> np.ndarray:
    output = engine.generate([ids], greedy(1, prompt_logprobs=0))[0]
    told = output.prompt_logprobs
    return np.array([entry.logprob for entry in told[1:]])


@pytest.mark.parametrize("name", hf.CASES)
def test_bfloat16_is_as_near_to_float32_as_on_the_cpu(name, tmp_path, make_engine, device):
    path = hf.make_checkpoint(tmp_path, name)
    model, _ = load_model(path, dtype="bfloat16")
    expected = hf.expectations(name)[-1]
    ids = expected.prompt + expected.tokens
    exact = reference_logprobs(model, ids)
    errors = {}
    for on in ("cpu", device):
        engine = make_engine(path, device=on, dtype="bfloat16", device_memory=MEMORY)
        errors[on] = np.abs(engine_logprobs(engine, ids) - exact)
    what = f"{name}, seed {hf.CASES[name].seed}"
    assert errors[device].mean() <= 1.5 * errors["cpu"].mean() + 1e-3, what
    assert errors[device].max() <= 2.0 * errors["cpu"].max() + 1e-2, what
