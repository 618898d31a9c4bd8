"""`Engine.submit`: futures instead of waiting."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ellm_jax import EngineClosed, SamplingParams


def _greedy(max_tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, n=n)


def test_futures_hold_what_generate_gives(
    tiny_checkpoint: Callable[..., Path], make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(tiny_checkpoint("llama"))
    prompts = [[5, 6, 7], [8, 9], [10] * 40]
    futures = [engine.submit(prompt, _greedy(6, n=2)) for prompt in prompts]
    assert not futures[0].cancel(), "only abort ends a request"
    outputs = [future.result(timeout=120) for future in futures]
    expected = engine.generate(prompts, _greedy(6))
    for output, alone in zip(outputs, expected, strict=True):
        assert output.finished
        assert [c.token_ids for c in output.outputs] == [alone.token_ids] * 2


def test_what_makes_no_sense_is_refused_at_the_call(
    tiny_checkpoint: Callable[..., Path], make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(tiny_checkpoint("llama"))
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.submit([], _greedy(3))
    running = engine.submit([5], _greedy(100), request_id="mine")
    assert engine.abort("mine")
    assert running.result(timeout=120).outputs[0].finish_reason == "abort"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_engine_fails_its_futures(
    tiny_checkpoint: Callable[..., Path], make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(tiny_checkpoint("llama"))
    step = engine._loop.step

    def broken() -> None:
        raise AssertionError("the ledger is off")

    engine._loop.step = broken
    future = engine.submit([5], _greedy(100))
    with pytest.raises(EngineClosed, match="the ledger is off"):
        future.result(timeout=120)
    engine._thread._thread.join(timeout=60)
    engine._loop.step = step
    with pytest.raises(EngineClosed):
        engine.submit([5], _greedy(3))
