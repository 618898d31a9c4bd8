"""Which compiled step is taken, and what becomes of those that cannot be compiled."""

import threading
import time

import pytest

from ellm_jax import SamplingParams
from ellm_jax._native import OutOfMemory
from ellm_jax.runtime import compiler as compiling
from ellm_jax.runtime.buckets import Buckets
from ellm_jax.runtime.compiler import StepCompiler
from ellm_jax.runtime.failures import CompileFailed
from ellm_jax.runtime.shapes import StepKey, StepMode, StepShape

PLAIN = StepMode()
SHORT = "RESOURCE_EXHAUSTED: out of memory while allocating 2147483648 bytes"


class FakeRunner:
    """Compiles in no time, or fails.

    Attributes:
        compiled: every try, in order.
        failures: what the next tries fail with.
    """

    def __init__(self) -> None:
        self.compiled: list[StepShape] = []
        self.failures: list[str] = []
        self.lock = threading.Lock()

    def compile(self, key: StepKey) -> int:
        with self.lock:
            self.compiled.append(key.shape)
            if self.failures:
                raise RuntimeError(self.failures.pop(0))
        return 1000 * key.shape.rows + key.shape.seqs


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def steps(runner):
    """A compiler for a device that computes padding too."""
    compiler = StepCompiler(runner, Buckets(64, 262144, skips_padding=False), progress=False)
    yield compiler
    compiler.close()


def settled(compiler: StepCompiler) -> None:
    """The background has done what it was asked, and that was taken over."""
    compiling.wait(list(compiler._pending.values()))
    compiler.collect()


def test_a_decode_does_not_run_on_the_step_that_is_reserved_for_prompts(steps, runner):
    reserved = StepKey(StepShape(262144, 64), PLAIN)
    steps.ensure(reserved)
    key = steps.choose(5, 5, PLAIN)
    assert key.shape.rows <= 16
    # A plan that may come to nothing is counted with the large one, and compiles nothing.
    assert steps.need_bytes(5, 5, PLAIN, False) == steps.ensure(reserved)
    assert runner.compiled == [reserved.shape]
    steps.ensure(key)
    assert steps.choose(5, 5, PLAIN) == key
    # A little too large is better than to wait.
    most = StepKey(StepShape(64, 64), PLAIN)
    steps.ensure(most)
    assert steps.choose(40, 40, PLAIN) == most


def test_where_padding_costs_nothing_any_step_that_covers_is_taken(runner):
    steps = StepCompiler(runner, Buckets(64, 4096), progress=False)
    large = StepKey(StepShape(4096, 64), PLAIN)
    steps.ensure(large)
    assert steps.choose(5, 5, PLAIN) == large
    steps.close()


def test_compiling_gets_a_second_try_when_way_was_made(steps, runner):
    ways: list[int] = []
    steps.make_way = lambda: ways.append(len(runner.compiled))
    runner.failures = [SHORT]
    assert steps.ensure(StepKey(StepShape(1, 1), PLAIN)) == 1001
    # Between the two tries, and afterwards: compiling may have left something.
    assert ways == [1, 2]


def test_compiling_without_memory_is_pressure_and_no_fault_of_the_step(steps, runner):
    key = StepKey(StepShape(1, 1), PLAIN)
    steps.make_way = lambda: None
    runner.failures = [SHORT, SHORT]
    with pytest.raises(OutOfMemory, match=r"no memory to compile a step with.*RESOURCE_EXHAUSTED"):
        steps.ensure(key)
    assert steps.ensure(key) == 1001
    runner.failures = ["INTERNAL: ptxas has crashed"]
    with pytest.raises(CompileFailed, match="ptxas"):
        steps.ensure(StepKey(StepShape(4, 4), PLAIN))


def test_in_the_background_want_of_memory_is_tried_again_later(steps, runner, monkeypatch):
    ways: list[int] = []
    steps.make_way = lambda: ways.append(1)
    runner.failures = [SHORT]
    steps.refine(1, 1, PLAIN)
    settled(steps)
    assert ways == [1]
    steps.refine(1, 1, PLAIN)
    assert not steps._pending, "not at once"
    later = time.monotonic() + 31
    monkeypatch.setattr(compiling.time, "monotonic", lambda: later)
    steps.refine(1, 1, PLAIN)
    settled(steps)
    assert steps.choose(1, 1, PLAIN) == StepKey(StepShape(1, 1), PLAIN)
    assert runner.compiled == [StepShape(1, 1)] * 2


def test_in_the_background_another_failure_is_told_once_and_stops_nobody(steps, runner, caplog):
    runner.failures = ["INTERNAL: ptxas has crashed"]
    for _ in range(3):
        steps.refine(1, 1, PLAIN)
        settled(steps)
    assert runner.compiled == [StepShape(1, 1)]
    assert caplog.text.count("ptxas") == 1
    steps.warm_up_all()
    assert StepKey(StepShape(1, 1), PLAIN) in steps._needs


def test_a_request_outlives_a_step_that_had_no_memory_to_be_compiled_in(
    tiny_checkpoint, make_engine, monkeypatch
):
    # A mode that nothing is compiled for, so that the request has to wait for it.
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1)
    expected = make_engine(tiny_checkpoint("llama")).generate([5, 6, 7], params)[0].token_ids
    engine = make_engine(tiny_checkpoint("llama"))
    runner = engine._compiler._runner
    build, failures = runner._build, [SHORT, SHORT]

    def build_or_fail(key):
        if failures:
            raise RuntimeError(failures.pop())
        return build(key)

    monkeypatch.setattr(runner, "_build", build_or_fail)
    output = engine.generate([[5, 6, 7]], params)[0]
    assert output.outputs[0].error is None
    assert output.token_ids == expected
    assert not failures
