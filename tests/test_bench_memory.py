"""The largest batch that decodes behind a context."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_stub import StubEngine

from ellm_jax import SamplingParams
from ellm_jax.bench.capacity import compare_capacity, measure_capacity
from ellm_jax.bench.trace_request import WorkloadError
from ellm_jax.cli import main
from ellm_jax.loop_stats import LoopStats


@pytest.mark.parametrize("prefill", [False, True])
def test_as_many_decode_as_memory_holds(
    tiny_checkpoint: Callable[..., Path], make_engine: Callable[..., Any], prefill: bool
) -> None:
    engine = make_engine(tiny_checkpoint("llama"), device_memory="8MiB", max_num_seqs=16)
    found = measure_capacity(engine, 128, output_tokens=100, watch_s=0.5, prefill=prefill)
    assert found.bounded == "memory"
    assert 1 < found.batch < 16
    assert found.kv_bytes <= found.limit_bytes == 8 * 2**20
    # Each holds its context; what is left does not hold another one.
    layout = engine._loop.ledger.kv.layout
    context_bytes = -(-128 // layout.tile_tokens) * layout.chunk_bytes
    assert found.batch * context_bytes <= found.kv_bytes
    assert 0 < found.mean_batch <= found.batch + 1
    assert found.decode_tokens_per_s > 0
    assert found.tpot_ms > 0
    # The engine is as it was: nothing is left, and prompts are computed again.
    assert engine.memory().kv_bytes == 0
    prompt = list(range(5, 40))
    params = SamplingParams(temperature=0.0, max_tokens=6)
    after = engine.generate(prompt, params)[0].token_ids
    fresh = make_engine(tiny_checkpoint("llama"), device_memory="8MiB")
    assert after == fresh.generate(prompt, params)[0].token_ids


def test_a_context_that_fits_many_times_is_bounded_by_the_other_limit(
    tiny_checkpoint: Callable[..., Path], make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(tiny_checkpoint("llama"), max_num_seqs=3)
    found = measure_capacity(engine, 20, output_tokens=200, watch_s=0.3)
    assert (found.batch, found.bounded, found.preemptions) == (3, "max_num_seqs", 0)
    assert found.mean_batch == pytest.approx(3, abs=0.3)


def test_what_cannot_run_or_ends_too_soon_is_told(
    tiny_checkpoint: Callable[..., Path], make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(tiny_checkpoint("llama"), device_memory="8MiB")
    with pytest.raises(WorkloadError, match="has 250 \\+ 7 tokens, and max_model_len is 256"):
        measure_capacity(engine, 250, output_tokens=7)
    with pytest.raises(WorkloadError, match="ask for more than 1 tokens"):
        measure_capacity(engine, 20, output_tokens=1, watch_s=0.01)

    class Unseen(StubEngine):
        def stats(self) -> LoopStats:
            return LoopStats()

    with (
        Unseen(prefill_s=0.001, token_s=0.001) as stub,
        pytest.raises(WorkloadError, match="ask for more than 5 tokens"),
    ):
        measure_capacity(stub, 20, output_tokens=5, watch_s=0.01, prefill=True)


def test_each_policy_at_each_context() -> None:
    told: list[str] = []
    made: list[StubEngine] = []

    def make(policy: str) -> StubEngine:
        made.append(StubEngine(prefill_s=0.001, token_s=0.001))
        return made[-1]

    results = compare_capacity(
        make, ["a", "b"], [8, 16], output_tokens=50, prefill=True, tell=told.append
    )
    assert [[found.context for found in by_policy] for by_policy in results.values()] == [
        [8, 16]
    ] * 2
    assert told == [f"{p}, context of {n} tokens" for n in (8, 16) for p in ("a", "b")]
    assert all(engine.closed for engine in made)
    for engine in made:
        prompts = {asked["prompt"] for asked in engine.asked}
        assert len(prompts) == len(engine.asked) == 5, "two prompts are alike: they share memory"


def test_the_command(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "m.json"
    model = str(tiny_checkpoint("llama", context=1024))
    command = ["bench", "memory", "--model", model, "--quiet"]
    command += ["--context", "32", "--output-len", "900", "--seconds", "0.2", "--no-warm-up"]
    command += ["--device-memory", "24MiB", "--max-num-seqs", "2", "--max-batch-tokens", "16"]
    policies = ["--policy", "elastic", "--policy", "static-chunked"]
    assert main([*command, *policies, "--json", "--save", str(saved)]) == 0
    written = json.loads(capsys.readouterr().out)
    assert json.loads(saved.read_text()) == written
    assert list(written["policies"]) == ["elastic", "static-chunked"]
    assert [run["context"] for run in written["policies"]["elastic"]["runs"]] == [32]
    assert main([*command, "--context", "20"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("context of 32 tokens\n")
    assert "\n\ncontext of 20 tokens\n" in shown
    assert "largest batch" in shown
    assert main([*command, "--context", "100000"]) == 2
    assert "max_model_len" in capsys.readouterr().err
