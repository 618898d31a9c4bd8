"""The engine's answers against stored results of transformers, and against itself under pressure,
in any batch and by any way of asking."""

import asyncio
import threading

import hf_checkpoints
import pytest
from engine_requests import greedy, random_requests, wait_until

from ellm_jax import SamplingParams


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


def test_counters_say_what_ran(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"), max_num_seqs=1)
    prompt = list(range(1, 61))
    for _ in range(2):
        engine.generate(prompt, greedy(5))
    stats = engine.stats()
    assert (stats.started, stats.prefix_hits, stats.output_tokens) == (2, 1, 10)
    assert stats.prompt_tokens == 120
    assert 0 < stats.cached_tokens < 60
    assert stats.compiled_steps > 0


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


def test_an_idle_engine_gives_its_memory_back(tiny_checkpoint, make_engine):
    engine = make_engine(
        tiny_checkpoint("llama", context=1024), idle_trim_s=0.2, prefix_caching=False
    )
    engine.generate([[5] * 300] * 4, greedy(10))
    wait_until(lambda: engine.memory().physical_bytes <= engine.memory().weights_bytes + 2**16)
    assert len(engine.generate([5] * 300, greedy(10))[0].token_ids) == 10
