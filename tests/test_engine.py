"""The engine against stored results of transformers, against itself under pressure, and against
callers who leave or ask for nonsense."""

import asyncio
import random
import threading
import time

import hf_checkpoints
import pytest

from ellm_jax import EngineClosed, EngineConfig, SamplingParams
from ellm_jax.engine import Engine


def greedy(max_tokens, **more):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def random_requests(seed, count, prompt, output):
    rng = random.Random(seed)
    return [
        ([rng.randrange(3, 512) for _ in range(rng.randint(*prompt))], rng.randint(*output))
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", sorted(hf_checkpoints.CASES))
def test_parity_with_transformers(name, tiny_checkpoint, make_engine):
    """Greedy tokens equal, logprobs within 1e-4; prompts of mixed lengths, prefilled in chunks."""
    engine = make_engine(tiny_checkpoint(name), max_batch_tokens=32, max_num_seqs=4)
    expected = hf_checkpoints.expectations(name)
    assert any(len(e.prompt) > 64 for e in expected), "no prompt needs several chunks"
    outputs = engine.generate(
        [e.prompt for e in expected], greedy(hf_checkpoints.NEW_TOKENS, logprobs=0)
    )
    for output, e in zip(outputs, expected, strict=True):
        assert list(output.token_ids) == e.tokens
        entries = output.outputs[0].logprobs
        assert [entry.logprob for entry in entries] == pytest.approx(e.logprobs, abs=1e-4)


def test_many_requests_through_a_small_pool_answer_as_each_alone(tiny_checkpoint, make_engine):
    """A pool of about eight requests serves 64: all complete, and pressure changes no token."""
    seed = 1
    path = tiny_checkpoint("llama", context=1024)
    requests = random_requests(seed, 64, prompt=(32, 512), output=(16, 256))
    small = make_engine(path, device_memory="18MiB", max_num_seqs=64, max_batch_tokens=256)
    outputs = small.generate([p for p, _ in requests], [greedy(n) for _, n in requests])
    assert 3 <= small.stats().peak_running <= 20
    assert {o.outputs[0].finish_reason for o in outputs} == {"length"}
    alone = make_engine(path, device_memory="256MiB", max_num_seqs=64, max_batch_tokens=256)
    for (prompt, count), output in zip(requests, outputs, strict=True):
        assert len(output.token_ids) == count
        expected = alone.generate(prompt, greedy(count))[0].token_ids
        assert output.token_ids == expected, f"seed {seed}"
    report = small.memory()
    assert report.kv_bytes == report.activation_bytes == 0
    assert sum(report.by_owner().values()) == report.limit_bytes


@pytest.mark.parametrize(("dtype", "device_memory"), [("float32", "11MiB"), ("bfloat16", "6MiB")])
def test_preemption_changes_no_token(dtype, device_memory, tiny_checkpoint, make_engine):
    """Short prompts that all grow until the pool is full: some are preempted and computed again."""
    path = tiny_checkpoint("llama", context=1024)
    requests = random_requests(5, 12, prompt=(20, 40), output=(300, 400))
    small = make_engine(
        path, device_memory=device_memory, max_num_seqs=12, max_batch_tokens=64, dtype=dtype
    )
    outputs = small.generate([p for p, _ in requests], [greedy(n) for _, n in requests])
    assert small.stats().preemptions > 0
    assert sum(o.metrics.num_preemptions for o in outputs) == small.stats().preemptions
    large = make_engine(
        path, device_memory="256MiB", max_num_seqs=12, max_batch_tokens=64, dtype=dtype
    )
    expected = large.generate([p for p, _ in requests], [greedy(n) for _, n in requests])
    assert large.stats().preemptions == 0
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]


def test_sampling_is_repeatable_and_independent_of_the_batch(tiny_checkpoint, make_engine):
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(path)
    params = SamplingParams(
        temperature=0.9, top_k=50, top_p=0.95, seed=7, max_tokens=40, ignore_eos=True,
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1,
    )  # fmt: skip
    alone = engine.generate([5, 6, 7], params)[0].token_ids
    others = random_requests(2, 6, prompt=(5, 80), output=(10, 60))
    mixed = engine.generate(
        [[5, 6, 7], *(p for p, _ in others)], [params, *(greedy(n) for _, n in others)]
    )
    assert mixed[0].token_ids == alone
    assert len(set(alone)) > 5
    assert engine.generate([5, 6, 7], SamplingParams(temperature=0.9, max_tokens=40))[0]


def test_preempted_sampling_goes_on_as_if_nothing_had_happened(tiny_checkpoint, make_engine):
    path = tiny_checkpoint("llama", context=1024)
    requests = random_requests(6, 10, prompt=(20, 40), output=(250, 350))
    params = [
        SamplingParams(
            temperature=0.8, seed=i, max_tokens=n, ignore_eos=True, frequency_penalty=0.3
        )
        for i, (_, n) in enumerate(requests)
    ]
    prompts = [p for p, _ in requests]
    small = make_engine(path, device_memory="11MiB", max_num_seqs=10, max_batch_tokens=64)
    outputs = small.generate(prompts, params)
    assert small.stats().preemptions > 0
    large = make_engine(path, device_memory="256MiB", max_num_seqs=10, max_batch_tokens=64)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in large.generate(prompts, params)]


def test_n_completions_logit_bias_min_tokens_and_stop_tokens(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"))
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    output = engine.generate([9, 10, 11], params)[0]
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({c.token_ids for c in output.outputs}) == 3

    forced = SamplingParams(temperature=0, max_tokens=5, logit_bias={77: 100.0}, ignore_eos=True)
    assert engine.generate([9, 10], forced)[0].token_ids == (77,) * 5

    plain = engine.generate([9, 10], greedy(20))[0].token_ids
    stop = plain[3]
    first = plain.index(stop)
    stopped = engine.generate([9, 10], greedy(20, stop_token_ids=[stop]))[0].outputs[0]
    assert stopped.token_ids == plain[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    later = engine.generate([9, 10], greedy(20, stop_token_ids=[stop], min_tokens=10))[0]
    assert len(later.token_ids) >= 10
    assert stop not in later.token_ids[:10]


def test_logprobs_add_up(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"), max_batch_tokens=32)
    prompt = list(range(3, 73))
    output = engine.generate(prompt, greedy(6, logprobs=5, prompt_logprobs=3))[0]
    completion = output.outputs[0]
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry.token_id == token == entry.top[0][0]
        assert entry.rank == 1
        assert len(entry.top) == 5
    total = sum(e.logprob for e in completion.logprobs)
    assert completion.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs[0] is None
    assert [e.token_id for e in output.prompt_logprobs[1:]] == prompt[1:]
    # What follows a prompt is the same whether it is prompt or output.
    longer = engine.generate(prompt + list(completion.token_ids), greedy(1, prompt_logprobs=1))[0]
    again = [e.logprob for e in longer.prompt_logprobs[len(prompt) :]]
    assert again == [e.logprob for e in completion.logprobs]


def test_physical_memory_follows_the_tokens(tiny_checkpoint, make_engine):
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(path, device_memory="64MiB")
    ledger = engine._loop.ledger
    layout = ledger.kv.layout
    # The range covers every slot at full context, and is much larger than what is ever mapped.
    assert layout.reserved_bytes >= 8 * 1024 * layout.token_bytes
    step = engine._loop.step
    seen = []

    def watched_step():
        step()
        running = engine._loop.scheduler.running
        mapped = sum(ledger.kv.mapped_bytes(r.slot) for r in running)
        tokens = sum(-(-r.num_tokens // layout.tile_tokens) for r in running)
        seen.append((mapped, tokens * layout.chunk_bytes, len(running)))

    engine._loop.step = watched_step
    requests = random_requests(4, 8, prompt=(10, 200), output=(50, 120))
    engine.generate([p for p, _ in requests], [greedy(n) for _, n in requests])
    assert max(running for _, _, running in seen) == 8
    for mapped, needed, running in seen:
        assert mapped <= needed + running * layout.chunk_bytes


def test_stream_yields_growing_outputs_and_aborts_when_left(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama", context=1024))
    lengths, last = [], None
    for output in engine.stream([4, 5, 6], greedy(30)):
        lengths.append(len(output.token_ids))
        last = output
    assert lengths == sorted(lengths)
    assert last.finished
    assert len(last.token_ids) == 30

    stream = engine.stream([4, 5, 6], greedy(900))
    next(stream)
    stream.close()
    wait_until(lambda: engine.memory().kv_bytes == 0)
    assert not engine._loop.scheduler.running


def test_stream_async_serves_many_and_aborts_a_cancelled_task(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama", context=1024))

    async def read(prompt, count):
        async for output in engine.stream_async(prompt, greedy(count)):
            last = output
        return last.token_ids

    async def main():
        cancelled = asyncio.create_task(read([8, 9], 900))
        others = [asyncio.create_task(read([i + 3, 7], 20)) for i in range(5)]
        results = await asyncio.gather(*others)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        return results

    results = asyncio.run(asyncio.wait_for(main(), 120))
    assert results == [engine.generate([i + 3, 7], greedy(20))[0].token_ids for i in range(5)]
    wait_until(lambda: engine.memory().kv_bytes == 0)


def test_abort_by_id_from_another_thread(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama", context=1024))
    stream = engine.stream([4, 5, 6], greedy(900), request_id="mine")
    next(stream)
    with pytest.raises(ValueError, match="in use"):
        engine.stream([4], greedy(4), request_id="mine")
    threading.Thread(target=engine.abort, args=("mine",)).start()
    *_, last = stream
    assert last.outputs[0].finish_reason == "abort"
    assert not engine.abort("mine")


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


def test_requests_with_sampler_state_wait_for_a_row(tiny_checkpoint, make_engine):
    """A limit that affords few rows of state: penalised requests take turns, all are answered."""
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(path, device_memory="8MiB", max_num_seqs=64, max_batch_tokens=64)
    loop = engine._loop
    loop.scheduler._state_rows = 2
    params = [
        greedy(30, frequency_penalty=0.5) if i % 2 else greedy(30, presence_penalty=0.5)
        for i in range(7)
    ]
    prompts = [[5 + i, 6, 7] for i in range(7)]
    outputs = engine.generate(prompts, params)
    assert [len(o.token_ids) for o in outputs] == [30] * 7
    alone = [engine.generate(p, q)[0].token_ids for p, q in zip(prompts, params, strict=True)]
    assert [o.token_ids for o in outputs] == alone


@pytest.mark.parametrize("warm_up", [True, False])
def test_what_intake_accepts_can_run_to_its_end(warm_up, tiny_checkpoint, make_engine):
    """The largest request that is not refused fills the room that is left, in any mode."""
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(path, device_memory="9MiB", max_num_seqs=2, warm_up=warm_up)
    room = engine._intake.room_bytes // engine._intake.chunk_bytes * engine._intake.tile_tokens
    assert 60 < room < 1000, "the limit does not bind"
    with pytest.raises(ValueError, match="device_memory leaves"):
        engine.generate([5] * (room - 19), greedy(21))
    for more in ({}, {"logprobs": 2, "prompt_logprobs": 2}):
        output = engine.generate([5] * (room - 19), greedy(20, **more))[0]
        assert output.outputs[0].error is None
        assert len(output.token_ids) == 20


@pytest.mark.parametrize("max_batch_tokens", [7, 50, 100])
def test_prompt_logprobs_with_steps_of_any_size(max_batch_tokens, tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"), max_batch_tokens=max_batch_tokens)
    prompt = [3 + 5 * i % 500 for i in range(130)]
    output = engine.generate(prompt, greedy(2, prompt_logprobs=1))[0]
    assert [e.token_id for e in output.prompt_logprobs[1:]] == prompt[1:]
    whole = make_engine(tiny_checkpoint("llama"), max_batch_tokens=256)
    assert whole.generate(prompt, greedy(2, prompt_logprobs=1))[0].prompt_logprobs == (
        output.prompt_logprobs
    )


def test_a_reused_slot_holds_no_more_than_its_tokens(tiny_checkpoint, make_engine):
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(path, idle_trim_s=60.0, prefix_caching=False)
    engine.generate([5] * 900, greedy(10))
    kv = engine._loop.ledger.kv
    assert kv.stats()["available_bytes"] > 10 * kv.layout.chunk_bytes
    step, seen = engine._loop.step, []

    def watched_step():
        step()
        seen.extend(kv.mapped_bytes(r.slot) for r in engine._loop.scheduler.running)

    engine._loop.step = watched_step
    engine.generate([5] * 14, greedy(6))
    assert max(seen) == kv.layout.chunk_bytes
    assert kv.stats()["unmap_calls"] > 0


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
    """A step that reads past its slot's mapping fails on the device; its requests start anew."""
    path = tiny_checkpoint("llama", context=1024)
    requests = random_requests(9, 5, prompt=(30, 120), output=(30, 60))
    prompts, params = [p for p, _ in requests], [greedy(n) for _, n in requests]
    engine = make_engine(path)
    expected = [o.token_ids for o in engine.generate(prompts, params)]
    runner = engine._loop.executor._runner
    dispatch = runner.dispatch
    for failing in (0, 3, 20):
        calls = iter(range(10**9))

        def sometimes(key, spans, *args, calls=calls, failing=failing):
            if next(calls) == failing:
                spans = [span._replace(context_tokens=1 << 20) for span in spans]
            return dispatch(key, spans, *args)

        monkeypatch.setattr(runner, "dispatch", sometimes)
        outputs = engine.generate(prompts, params)
        assert [o.token_ids for o in outputs] == expected, f"step {failing} failed"


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
    engine._loop._steps_of.clear()
    engine._loop._leaving.clear()


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


def test_an_idle_engine_gives_its_memory_back(tiny_checkpoint, make_engine):
    engine = make_engine(
        tiny_checkpoint("llama", context=1024), idle_trim_s=0.2, prefix_caching=False
    )
    engine.generate([[5] * 300] * 4, greedy(10))
    wait_until(lambda: engine.memory().physical_bytes <= engine.memory().weights_bytes + 2**16)
    assert len(engine.generate([5] * 300, greedy(10))[0].token_ids) == 10


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
