"""Steps as a GPU runs them, on the CPU: two programs per shape, and a check before dispatch."""

import dataclasses
import re
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from ellm_jax import SamplingParams
from ellm_jax.checkpoint import load_model
from ellm_jax.devices.cpu import CpuDevice
from ellm_jax.runtime import sampler
from ellm_jax.runtime.batch import StepLayout
from ellm_jax.runtime.cuda_ops import COMPILER_OPTIONS, CudaOps
from ellm_jax.runtime.sampler import SamplingInputs
from ellm_jax.runtime.shapes import StepMode, StepShape
from ellm_jax.runtime.step import build_step, initial_carry, on_one

SEED = 20


def inputs_of(rng: np.random.Generator, rows: int) -> SamplingInputs:
    """Greedy rows, noisy ones, filters and penalties, mixed."""
    neutral = sampler.neutral_inputs(rows)
    noisy = rng.random(rows) < 0.5
    return neutral._replace(
        temperature=np.where(noisy, rng.random(rows), 0).astype(np.float32),
        top_k=np.where(rng.random(rows) < 0.3, 5, 0).astype(np.int32),
        top_p=np.where(rng.random(rows) < 0.3, 0.7, 1).astype(np.float32),
        min_p=np.where(rng.random(rows) < 0.3, 0.05, 0).astype(np.float32),
        repetition=np.where(rng.random(rows) < 0.3, 1.3, 1).astype(np.float32),
        seed=rng.integers(0, 1 << 31, rows).astype(np.uint32),
        position=np.arange(rows, dtype=np.int32),
        row=np.where(rng.random(rows) < 0.5, np.arange(rows) + 1, 0).astype(np.int32),
    )


@pytest.mark.parametrize("kind", ["mixed", "greedy", "noisy"])
def test_work_that_no_row_asks_for_may_be_done_all_the_same(kind):
    rng = np.random.default_rng(SEED)
    rows, vocab = 12, 300
    inputs = inputs_of(rng, rows)
    if kind == "greedy":
        inputs = sampler.neutral_inputs(rows)
    elif kind == "noisy":
        inputs = sampler.neutral_inputs(rows)._replace(temperature=np.full(rows, 0.7, np.float32))
    logits = rng.normal(size=(rows, vocab)).astype(np.float32)
    words = rng.integers(0, 9, (rows + 1, vocab)).astype(np.int32)
    words[0] = 0
    state = sampler.SamplerState(words, np.zeros((rows + 1, vocab), np.float32))
    run = jax.jit(sampler.sample, static_argnames="together")
    tokens, after = run(logits, inputs, state)
    all_tokens, all_after = run(logits, inputs, state, together=True)
    np.testing.assert_array_equal(tokens, all_tokens, err_msg=f"seed {SEED}")
    np.testing.assert_array_equal(after.words, all_after.words)
    if kind == "greedy":
        np.testing.assert_array_equal(tokens, sampler.greedy(logits, together=True))


class AsOnAGpu:
    """Has engines on the CPU run their steps as those on a GPU do.

    Attributes:
        prepared: shapes that were about to run for the first time.
        refused: how many of the next checks are to fail.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.prepared: list[object] = []
        self.refused = 0
        self.checked = 0
        make = CpuDevice.make_backend

        def make_backend(device, kv_id, kv):
            def check(meta):
                self.checked += 1
                kv.check_step(meta)
                if self.refused:
                    self.refused -= 1
                    raise RuntimeError("refused on purpose")

            return dataclasses.replace(
                make(device, kv_id, kv),
                host_skips=True,
                check=check,
                prepare=lambda config, shape: self.prepared.append(shape),
            )

        monkeypatch.setattr(CpuDevice, "make_backend", make_backend)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    return AsOnAGpu(monkeypatch)


ASKED = [
    SamplingParams(temperature=0.0, max_tokens=12),
    SamplingParams(temperature=0.9, seed=3, max_tokens=12, top_p=0.8),
    SamplingParams(temperature=0.0, max_tokens=12, frequency_penalty=0.7),
    SamplingParams(temperature=0.0, max_tokens=12, logprobs=2),
]


def test_answers_are_those_of_one_program(tiny_checkpoint, make_engine, monkeypatch):
    prompts = [[i + 3] * (5 + 40 * i) for i in range(4)]
    plain = make_engine(tiny_checkpoint("llama"))
    expected = [o.token_ids for o in plain.generate(prompts, ASKED)]
    greedy = plain.generate(prompts, ASKED[0])
    gpu = AsOnAGpu(monkeypatch)
    engine = make_engine(tiny_checkpoint("llama"))
    assert [o.token_ids for o in engine.generate(prompts, ASKED)] == expected
    again = engine.generate(prompts, ASKED[0])
    assert [o.token_ids for o in again] == [o.token_ids for o in greedy]
    assert gpu.checked > 12
    assert len(gpu.prepared) == len(set(gpu.prepared)) > 1


def test_a_step_that_is_refused_is_planned_again(tiny_checkpoint, make_engine, as_on_a_gpu):
    engine = make_engine(tiny_checkpoint("llama"))
    expected = engine.generate([5, 6, 7], ASKED[0])[0].token_ids
    as_on_a_gpu.refused = 2
    assert engine.generate([5, 6, 7], ASKED[0])[0].token_ids == expected
    assert as_on_a_gpu.refused == 0


def test_a_request_whose_steps_are_always_refused_ends_with_the_reason(
    tiny_checkpoint, make_engine, as_on_a_gpu
):
    engine = make_engine(tiny_checkpoint("llama"))
    as_on_a_gpu.refused = 3
    output = engine.generate([5, 6, 7], ASKED[0])[0].outputs[0]
    assert output.finish_reason == "error"
    assert "refused on purpose" in output.error
    assert engine.generate([5, 6, 7], ASKED[0])[0].outputs[0].error is None


def conditions(text: str) -> list[str]:
    """What decides in a lowered program, but for constants, which XLA decides when it compiles."""
    assert "stablehlo.if" not in text
    return [name for name in re.findall(r'stablehlo.case"\((%\w+)\)', text) if name[:2] != "%c"]


@pytest.mark.parametrize("sampling", ["greedy", "all"])
@pytest.mark.parametrize("mode", [StepMode(), StepMode(logprobs=True, prompt_logprobs=True)])
def test_a_step_for_a_gpu_never_makes_the_host_wait(tiny_checkpoint, sampling, mode):
    """As JAX lowers it for CUDA: attention is our call, and nothing in it is a condition, whose
    outcome XLA reads back to the host."""
    model, config = load_model(tiny_checkpoint("qwen3_head128"), dtype="bfloat16")
    graph, weights = nnx.split(model)
    layout = StepLayout(StepShape(32, 4), num_slots=4)
    make_ops = partial(CudaOps, kv_id=1, max_tokens=256)
    step = build_step(graph, layout, mode, make_ops, sampling)
    carry = jax.eval_shape(lambda: initial_carry(4))
    state = jax.eval_shape(lambda: sampler.init_state(5, config.vocab_size))
    meta = jax.ShapeDtypeStruct((layout.words,), np.int32)
    traced = on_one(step, COMPILER_OPTIONS).trace(weights, meta, carry, state)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Layers are scanned: one call stands for all, but for a last one that computes few rows.
    assert text.count("@ellm_attention_cuda") == (1 if mode.prompt_logprobs else 2)
    assert not conditions(text)
    plain = on_one(build_step(graph, layout, mode, make_ops)).trace(weights, meta, carry, state)
    assert conditions(plain.lower(lowering_platforms=("cuda",)).as_text())
