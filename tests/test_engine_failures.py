"""The engine against callers who ask for nonsense, limits that do not suffice, and parts that fail:
whoever can be served is, the others are told why, and nothing is left behind."""

import threading
import time

import pytest
from engine_requests import check_that_failed_steps_are_run_again, greedy, random_requests

from ellm_jax import EngineClosed, EngineConfig
from ellm_jax.engine import Engine
from ellm_jax.runtime.failures import StepFailed


@pytest.mark.parametrize(
    ("prompt", "params", "error", "match"),
    [
        ("", {}, ValueError, "prompt is empty"),
        ([], {}, ValueError, "prompt is empty"),
        ([3, 512], {}, ValueError, "token id 512 is outside the vocabulary of 512"),
        ([3, -1], {}, ValueError, "token id -1"),
        ([3] * 256, {}, ValueError, "256 tokens.*max_model_len=256"),
        ([3, "x"], {}, TypeError, "'x' among its token ids"),
        (4.5, {}, TypeError, "type float"),
        ("text", {}, ValueError, "no tokenizer.json"),
        ([3], {"stop": "x"}, ValueError, "no tokenizer.json"),
        ([3], {"logit_bias": {600: 1}}, ValueError, "logit_bias names token 600"),
    ],
)
def test_bad_requests_get_a_clear_error_and_the_engine_goes_on(
    prompt, params, error, match, tiny_checkpoint, make_engine
):
    engine = make_engine(tiny_checkpoint("llama"), warm_up=False)
    with pytest.raises(error, match=match):
        next(engine.stream(prompt, greedy(4, **params)))
    with pytest.raises(error, match=match):
        engine.generate([[5, 6], prompt], greedy(4, **params))
    assert len(engine.generate([5, 6], greedy(3))[0].token_ids) == 3


def test_a_request_that_can_never_fit_is_told_which_limit(tiny_checkpoint, make_engine):
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(path, device_memory="8MiB", max_batch_tokens=32, max_num_seqs=2)
    refusal = r"device_memory leaves .* raise device_memory, or "
    with pytest.raises(ValueError, match=refusal + "shorten the prompt"):
        engine.generate([5] * 900, greedy(100))
    with pytest.raises(ValueError, match=refusal + "lower max_tokens"):
        engine.generate([5] * 20, greedy(900))
    assert len(engine.generate([5] * 20, greedy(100))[0].token_ids) == 100


def test_a_limit_below_the_weights_says_so(tiny_checkpoint):
    with pytest.raises(MemoryError, match=r"device_memory is 1.00 MiB, the weights alone take"):
        Engine.from_pretrained(
            tiny_checkpoint("llama"), EngineConfig(device_memory="1MiB", progress=False)
        )


@pytest.mark.parametrize("call", ["release", "truncate", "trim_available"])
def test_unmapping_that_fails_costs_no_answer(call, tiny_checkpoint, make_engine, monkeypatch):
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(path, idle_trim_s=0.05)
    expected = engine.generate([[5] * 300, [6] * 20], greedy(8))
    ledger = engine._loop.ledger

    class Failing:
        """The KV cache, with one call that fails after it has done its work."""

        def __init__(self, kv):
            self.kv = kv

        def __getattr__(self, name):
            if name != call:
                return getattr(self.kv, name)

            def fail(*args):
                getattr(self.kv, name)(*args)
                raise RuntimeError(f"injected: {name}")

            return fail

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "kv", Failing(ledger.kv))
        outputs = engine.generate([[5] * 300, [6] * 20], greedy(8))
        time.sleep(0.3)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert len(engine.generate([5], greedy(8))[0].token_ids) == 8


def test_mapping_that_fails_costs_no_answer(tiny_checkpoint, make_engine, monkeypatch):
    """The n-th call that maps fails, for the first ones: every request still gets its answer."""
    path = tiny_checkpoint("llama", context=1024)
    requests = random_requests(8, 6, prompt=(30, 120), output=(30, 80))
    prompts, params = [p for p, _ in requests], [greedy(n) for _, n in requests]
    expected = [o.token_ids for o in make_engine(path).generate(prompts, params)]
    engine = make_engine(path)
    ledger = engine._loop.ledger
    reserve = ledger.reserve
    for failing in range(0, 40, 3):
        calls = iter(range(10**9))

        def sometimes(*args, calls=calls, failing=failing):
            if next(calls) in (failing, failing + 1):
                raise RuntimeError("injected: the system refuses to map")
            return reserve(*args)

        monkeypatch.setattr(ledger, "reserve", sometimes)
        outputs = engine.generate(prompts, params)
        assert [o.token_ids for o in outputs] == expected, f"call {failing} failed"


def test_mapping_that_always_fails_ends_the_request_with_the_reason(
    tiny_checkpoint, make_engine, monkeypatch
):
    engine = make_engine(tiny_checkpoint("llama"))

    def never(*_):
        raise RuntimeError("injected: the system refuses to map")

    with monkeypatch.context() as patch:
        patch.setattr(engine._loop.ledger, "reserve", never)
        outputs = engine.generate([[5, 6], [7, 8]], greedy(4))
    for output in outputs:
        assert output.outputs[0].finish_reason == "error"
        assert "injected" in output.outputs[0].error
    assert len(engine.generate([5, 6], greedy(4))[0].token_ids) == 4


def test_steps_that_fail_are_run_again(tiny_checkpoint, make_engine, monkeypatch):
    engine = make_engine(tiny_checkpoint("llama", context=1024))
    check_that_failed_steps_are_run_again(engine, monkeypatch)


class Kernels:
    """Has an engine's steps fail as on a GPU: what a failed one has started goes on, and touches
    the slots that it names, until somebody waits for the device. Nothing of them may be unmapped
    before."""

    def __init__(self, engine, monkeypatch):
        self.engine = engine
        self.running = set()  # slots
        self.failures = self.waits = 0
        ledger, runner = engine._loop.ledger, engine._loop.executor._runner
        self._pool, self._kv = ledger._pool, ledger.kv
        self._dispatch, self._wait = runner.dispatch, runner.wait
        self._named = {}
        monkeypatch.setattr(runner, "dispatch", self.dispatch)
        monkeypatch.setattr(runner, "wait", self.wait)
        monkeypatch.setattr(ledger, "_pool", Delegate(self._pool, synchronize=self.synchronize))
        calls = {name: self.unmaps(name) for name in ("release", "release_async", "truncate")}
        calls |= {name: self.unmaps_any(name) for name in ("reclaim", "trim_available")}
        monkeypatch.setattr(ledger, "kv", Delegate(self._kv, **calls))
        self.fail_dispatch = self.fail_wait = lambda: False

    def dispatch(self, key, spans, *args):
        slots = {span.slot for span in spans}
        if self.fail_dispatch():
            self.running |= slots
            self.failures += 1
            raise StepFailed("injected: launched in part")
        result = self._dispatch(key, spans, *args)
        self._named[id(result)] = (result, slots)
        return result

    def wait(self, result):
        _, slots = self._named.pop(id(result))
        host = self._wait(result)
        if self.fail_wait():
            self.running |= slots
            self.failures += 1
            raise StepFailed("injected: ended in part")
        return host

    def synchronize(self):
        self._pool.synchronize()
        self.running.clear()
        self.waits += 1

    def unmaps(self, name):
        def call(slot, *args):
            assert slot not in self.running, f"{name} of a slot that a kernel works on"
            return getattr(self._kv, name)(slot, *args)

        return call

    def unmaps_any(self, name):
        def call(*args):
            assert not self.running, f"{name} while kernels run"
            return getattr(self._kv, name)(*args)

        return call


class Delegate:
    """Something with other methods in the place of some."""

    def __init__(self, of, **methods):
        self._of = of
        self.__dict__.update(methods)

    def __getattr__(self, name):
        return getattr(self._of, name)


@pytest.mark.parametrize("where", ["fail_dispatch", "fail_wait"])
def test_nothing_of_a_failed_step_is_given_up_before_the_device_is_done(
    where, tiny_checkpoint, make_engine, monkeypatch
):
    requests = random_requests(11, 8, prompt=(30, 120), output=(30, 60))
    prompts, params = [p for p, _ in requests], [greedy(n) for _, n in requests]
    engine = make_engine(
        tiny_checkpoint("llama", context=1024), device_memory="24MiB", max_num_seqs=4
    )
    expected = [o.token_ids for o in engine.generate(prompts, params)]
    calls = iter(range(10**9))
    with monkeypatch.context() as patch:
        kernels = Kernels(engine, patch)
        setattr(kernels, where, lambda: next(calls) % 16 == 5)
        outputs = engine.generate(prompts, params)
        assert kernels.failures > 3
        assert kernels.waits >= kernels.failures
        assert [o.token_ids for o in outputs] == expected


def test_a_device_that_cannot_be_waited_for_is_told_and_costs_no_answer(
    tiny_checkpoint, make_engine, monkeypatch, caplog
):
    engine = make_engine(tiny_checkpoint("llama"))
    expected = engine.generate([5, 6], greedy(6))[0].token_ids

    def refuse():
        raise RuntimeError("injected: a kernel has failed")

    runner, ledger = engine._loop.executor._runner, engine._loop.ledger
    wait = runner.wait
    calls = iter(range(10**9))

    def sometimes(result):
        host = wait(result)
        if next(calls) == 2:
            raise StepFailed("injected")
        return host

    with monkeypatch.context() as patch:
        patch.setattr(runner, "wait", sometimes)
        patch.setattr(ledger, "_pool", Delegate(ledger._pool, synchronize=refuse))
        assert engine.generate([5, 6], greedy(6))[0].token_ids == expected
    assert "injected: a kernel has failed" in caplog.text


def test_a_step_that_always_fails_ends_its_requests_only(tiny_checkpoint, make_engine, monkeypatch):
    engine = make_engine(tiny_checkpoint("llama"))
    runner = engine._loop.executor._runner
    dispatch = runner.dispatch

    def broken(key, spans, *args):
        return dispatch(key, [s._replace(context_tokens=1 << 20) for s in spans], *args)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "dispatch", broken)
        output = engine.generate([5, 6], greedy(4))[0]
    assert output.outputs[0].finish_reason == "error"
    assert "tokens are mapped" in output.outputs[0].error
    assert len(engine.generate([5, 6], greedy(4))[0].token_ids) == 4


def test_one_request_whose_steps_fail_does_not_drag_others_along(
    tiny_checkpoint, make_engine, monkeypatch
):
    engine = make_engine(tiny_checkpoint("llama", context=1024))
    prompts = [[9, 9, 9], *([i + 3, 7] for i in range(4))]
    expected = [o.token_ids for o in engine.generate(prompts, greedy(20))]
    runner = engine._loop.executor._runner
    dispatch = runner.dispatch

    def poisoned(key, spans, *args):
        broken = [
            span._replace(context_tokens=1 << 20) if list(span.tokens[:3]) == [9, 9, 9] else span
            for span in spans
        ]
        return dispatch(key, broken, *args)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "dispatch", poisoned)
        outputs = engine.generate(prompts, greedy(20))
    assert outputs[0].outputs[0].finish_reason == "error"
    assert [o.token_ids for o in outputs[1:]] == expected[1:]


def test_a_step_that_does_not_compile_ends_its_requests_only(
    tiny_checkpoint, make_engine, monkeypatch
):
    engine = make_engine(tiny_checkpoint("llama"), warm_up=True)
    compile_step = engine._loop.executor._runner.compile

    def refusing(key):
        if key.mode.logprobs:
            raise RuntimeError("injected: XLA refuses")
        return compile_step(key)

    monkeypatch.setattr(engine._loop.executor._runner, "compile", refusing)
    output = engine.generate([5, 6], greedy(4, logprobs=1))[0]
    assert "injected" in output.outputs[0].error
    assert len(engine.generate([5, 6], greedy(4))[0].token_ids) == 4


def test_a_failed_engine_tells_everybody_and_gives_its_memory_back(
    tiny_checkpoint, make_engine, monkeypatch
):
    engine = make_engine(tiny_checkpoint("llama", context=1024))
    stream = engine.stream([4, 5, 6], greedy(900))
    next(stream)

    def broken():
        raise AssertionError("injected: a defect")

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine._loop.scheduler, "plan", lambda *_, **__: broken())
    with pytest.raises(EngineClosed, match="injected"):
        list(stream)
    with pytest.raises(EngineClosed, match="injected"):
        engine.generate([5], greedy(2))
    engine.close()
    assert engine.memory().physical_bytes <= engine.memory().limit_bytes
    assert engine._loop.ledger.kv.stats()["active_bytes"] == 0
    engine._loop.lifecycle.steps_of.clear()
    engine._loop.lifecycle.leaving.clear()


def test_an_error_in_a_call_reaches_its_caller_and_the_engine_goes_on(
    tiny_checkpoint, make_engine, monkeypatch
):
    engine = make_engine(tiny_checkpoint("llama"))

    def refuse():
        raise RuntimeError("injected: no warm-up")

    monkeypatch.setattr(engine._loop.compiler, "warm_up_all", refuse)
    with pytest.raises(RuntimeError, match="injected"):
        engine.warm_up()
    assert len(engine.generate([5, 6], greedy(3))[0].token_ids) == 3


def test_closing_ends_what_runs_and_refuses_what_comes(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama", context=1024))
    stream = engine.stream([4, 5, 6], greedy(900))
    next(stream)
    engine.close()
    *_, last = stream
    assert last.outputs[0].finish_reason == "abort"
    with pytest.raises(EngineClosed, match="closed"):
        engine.generate([5], greedy(2))
