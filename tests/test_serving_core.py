"""The core of serving without a transport: streams, bounds, and how it all ends."""

import asyncio
import contextlib
import threading
from collections import Counter

import pytest
from engine_requests import wait_until
from grpc_server import WAIT_S, checked_engine, held_bytes
from serving_calls import ALICE, BOB, Notes, call, serving, until

from ellm_jax import SamplingParams, StructuredOutput
from ellm_jax.serving.call import Call
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.service import Service
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.stream import RequestStream
from ellm_jax.serving.tenants import Tenant
from ellm_jax.serving.texts import TEXTS_MAX


@pytest.fixture(scope="module")
def engine():
    with checked_engine() as engine:
        yield engine


# Streams.


def test_updates_put_together_are_the_output(engine):
    asked = [
        Call("Once upon a time", SamplingParams(max_tokens=40, seed=3, **more), ALICE)
        for more in (
            {},
            {"n": 3, "logprobs": 2},
            {"stop": [" the", "."]},
            {"stop": ["zzz"], "prompt_logprobs": 1},
        )
    ]

    async def test(service, notes):
        for each in asked:
            async with await service.open(each) as stream:
                updates = [update async for update in stream]
            output = stream.output()
            assert output.finished
            assert [update.finished for update in updates] == [False] * (len(updates) - 1) + [True]
            for own in output.outputs:
                deltas = [d for u in updates for d in u.deltas if d.index == own.index]
                assert "".join(d.text for d in deltas) == own.text
                assert tuple(t for d in deltas for t in d.token_ids) == own.token_ids
                assert deltas[-1].finish_reason == own.finish_reason
                assert deltas[-1].stop_reason == own.stop_reason
                assert all(d.finish_reason is None for d in deltas[:-1])
                if own.logprobs is not None:
                    assert tuple(e for d in deltas for e in d.logprobs) == own.logprobs
            again = await service.complete(each)
            assert [o.text for o in again.outputs] == [o.text for o in output.outputs]
            grown = [each async for each in service.stream(each)]
            assert [o.text for o in grown[-1].outputs] == [o.text for o in output.outputs]

    serving(engine, test)


def test_the_engine_wakes_the_loop_once_per_step(engine):
    async def test(service, notes):
        loop = asyncio.get_running_loop()
        wakes = []
        before = engine.stats().steps
        call_soon = loop.call_soon_threadsafe

        def counted(callback, *args, **more):
            wakes.append(callback)
            return call_soon(callback, *args, **more)

        loop.call_soon_threadsafe = counted
        await asyncio.gather(*(service.complete(call(30, (5, i))) for i in range(8, 16)))
        steps = engine.stats().steps - before
        assert len(wakes) <= steps + 2
        streams = [await service.open(call(30, (5, i))) for i in range(8, 16)]
        before, wakes[:] = engine.stats().steps, []

        async def read(stream):
            async with stream:
                return [update async for update in stream]

        await asyncio.gather(*map(read, streams))
        assert len(wakes) <= engine.stats().steps - before + 2

    serving(engine, test)


def test_news_of_many_is_told_in_turns(engine, monkeypatch):
    async def test(service, notes):
        loop = asyncio.get_running_loop()
        told, iteration, over = Counter(), 0, False
        note_news = RequestStream.note_news

        def count():
            nonlocal iteration
            iteration += 1
            if not over:
                loop.call_soon(count)

        def counted(stream, end=False):
            told[iteration] += 1
            note_news(stream, end)

        monkeypatch.setattr(RequestStream, "note_news", counted)
        monkeypatch.setattr(service._news, "_most", 3)
        loop.call_soon(count)
        calls = [call(30, (5, i)) for i in range(8, 8 + 2 * engine.config.max_num_seqs)]
        outputs = await asyncio.gather(*map(service.complete, calls))
        over = True
        assert [len(output.outputs[0].token_ids) for output in outputs] == [30] * len(calls)
        assert max(told.values()) <= 3

    serving(engine, test)


def test_a_slow_reader_gets_several_tokens_at_once(engine):
    async def test(service, notes):
        async with await service.open(call(50)) as stream:
            first = await anext(stream)
            await until(lambda: stream.group.finished)
            await asyncio.sleep(0.05)
            rest = [update async for update in stream]
        assert len(rest) == 1
        assert len(first.deltas[0].token_ids) + len(rest[0].deltas[0].token_ids) == 50

    serving(engine, test)


def test_an_answer_that_is_whole_stays_so(engine):
    """Whatever fails after its last token, before anybody has read it."""

    async def test(service, notes):
        async with await service.open(call(20)) as stream:
            await until(lambda: stream.end_told)
            service.fail_all(ServiceError(ErrorKind.UNAVAILABLE, "too late"))
            updates = [update async for update in stream]
        assert updates[-1].finished
        assert sum(len(update.deltas[0].token_ids) for update in updates) == 20
        assert notes.said[-1][2] == "done"

    serving(engine, test)


def test_leaving_frees_memory_whatever_the_phase(engine):
    before = held_bytes(engine)

    async def test(service, notes):
        queued = [await service.open(call(900, (5, i))) for i in range(40)]
        await until(lambda: service.stats().queued > 0)
        for stream in reversed(queued):
            stream.close()
            await stream.aclose()
        assert service.stats().open_streams == service.stats().queued == 0
        task = asyncio.create_task(service.complete(call(900)))
        await asyncio.sleep(0.05)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        async for _ in (stream := service.stream(call(900))):
            break
        await stream.aclose()
        assert service.stats().open_streams == 0

    notes = serving(engine, test)
    assert {entry[2] for entry in notes.said if entry[0] == "finished"} == {ErrorKind.CANCELLED}
    assert held_bytes(engine) == before


def test_a_deadline_ends_it_even_if_nobody_reads(engine):
    before = held_bytes(engine)

    async def test(service, notes):
        stream = await service.open(call(1000, options={"deadline_s": 0.1}))
        await until(lambda: stream.error is not None)
        await until(lambda: stream.group.finished)
        with pytest.raises(ServiceError) as caught:
            await anext(stream)
        assert caught.value.kind is ErrorKind.DEADLINE
        stream.close()
        with pytest.raises(ServiceError) as caught:
            await service.complete(call(options={"deadline_s": 0.0}))
        assert caught.value.kind is ErrorKind.DEADLINE

    serving(engine, test)
    assert held_bytes(engine) == before


def test_long_prompts_are_checked_off_the_loop(engine):
    async def test(service, notes):
        text = "word " * 1000
        refusal = None
        try:
            await service.complete(Call(text, SamplingParams(max_tokens=2), ALICE))
        except ServiceError as error:
            refusal = error
        tokens = len(engine.tokenizer.encode(text))
        assert (refusal is not None) == (tokens >= engine.max_model_len)
        if refusal is not None:
            assert (refusal.kind, refusal.param) == (ErrorKind.INVALID, "prompt")

    serving(engine, test)


def test_surrogates_are_refused(engine):
    async def test(service, notes):
        for work in (
            service.complete(Call("a\ud800", SamplingParams(), ALICE)),
            service.texts.tokenize("a\ud800", ALICE),
        ):
            with pytest.raises(ServiceError) as caught:
                await work
            assert caught.value.kind is ErrorKind.INVALID

    serving(engine, test)


def test_texts_of_a_tenant_have_a_bound_and_do_not_hold_up_prompts(engine, monkeypatch):
    free = threading.Event()
    encode = engine.tokenizer.encode

    def slow(text, special=True):
        if text == "slow":
            free.wait(WAIT_S)
        return encode(text, special)

    async def test(service, notes):
        tasks = [
            asyncio.create_task(service.texts.tokenize("slow", ALICE)) for _ in range(TEXTS_MAX)
        ]
        await asyncio.sleep(0)
        with pytest.raises(ServiceError, match="try again later") as caught:
            await service.texts.tokenize("slow", ALICE)
        assert caught.value.kind is ErrorKind.OVERLOADED
        assert caught.value.retry_after_s == 1.0
        of_bob = asyncio.create_task(service.texts.tokenize("slow", BOB))
        long = Call("word " * 420, SamplingParams(max_tokens=2), ALICE)
        assert (await service.complete(long)).outputs
        assert not of_bob.done()
        free.set()
        assert await asyncio.gather(*tasks, of_bob) == [encode("slow")] * (TEXTS_MAX + 1)
        assert await service.texts.tokenize("slow", ALICE) == encode("slow")

    monkeypatch.setattr(engine.tokenizer, "encode", slow)
    serving(engine, test)


def test_grammars_that_wait_too_long_are_no_fault_of_the_call(engine, monkeypatch):
    pytest.importorskip("llguidance")
    form = SamplingParams(max_tokens=4, structured=StructuredOutput(regex="[ab]{3}"))

    async def test(service, notes):
        free = threading.Event()
        grammars = engine._grammars
        monkeypatch.setattr(grammars, "_compile_s_max", 0.05)
        monkeypatch.setattr(grammars, "_compile", lambda wanted: free.wait(WAIT_S))
        with pytest.raises(ServiceError, match="not compiled within") as late:
            await service.open(Call([5, 6], form, ALICE))
        monkeypatch.setattr(grammars, "_waiting", 256)
        with pytest.raises(ServiceError, match="wait to be compiled") as many:
            await service.open(Call([5, 6], form, ALICE))
        for caught in (late, many):
            assert caught.value.kind is ErrorKind.OVERLOADED
            assert caught.value.param == "structured"
            assert caught.value.retry_after_s >= 1
        monkeypatch.undo()
        free.set()
        await until(lambda: grammars._waiting == 0)
        assert (await service.complete(Call([5, 6], form, ALICE))).outputs

    notes = serving(engine, test)
    assert [each[1] for each in notes.said[:2]] == [ErrorKind.OVERLOADED] * 2


# Bounds.


def test_every_bound_is_checked_before_anything_is_done(engine):
    over = {
        "n": call(n=5),
        "stop": call(stop=["a"] * 4),
        "stop_token_ids": call(stop_token_ids=[1, 2, 3, 4]),
        "logit_bias": call(logit_bias={i: 1.0 for i in range(4)}),
        "prompt": call(prompt=[5] * 21),
        "priority": call(options={"priority": -1}),
        "request_id": call(options={"request_id": "a b"}),
        "deadline_s": call(options={"deadline_s": float("nan")}),
    }

    async def test(service, notes):
        for param, asked in over.items():
            with pytest.raises(ServiceError) as caught:
                await service.open(asked)
            assert caught.value.param == param
            assert caught.value.kind in (ErrorKind.INVALID, ErrorKind.TOO_LARGE)
        long = Call("word " * 40, SamplingParams(), ALICE)
        with pytest.raises(ServiceError) as caught:
            await service.open(long)
        assert (caught.value.kind, caught.value.param) == (ErrorKind.TOO_LARGE, "prompt")
        admin = Tenant("admin", admin=True)
        assert (await service.complete(call(tenant=admin, options={"priority": -3}))).finished

    bounds = {"max_n": 4, "max_stop": 3, "max_logit_bias": 3, "max_prompt_tokens": 20}
    notes = serving(engine, test, **bounds)
    assert sum(entry[0] == "refused" for entry in notes.said) == len(over) + 1


# The end.


def test_draining_takes_no_more_and_waits_for_the_rest(engine):
    async def test(service, notes):
        stream = await service.open(call(60))
        drained = asyncio.create_task(service.drain(WAIT_S))
        await asyncio.sleep(0)
        assert service.draining
        assert not service.ready
        with pytest.raises(ServiceError) as caught:
            await service.complete(call())
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        assert caught.value.retry_after_s is not None
        async with stream:
            async for _ in stream:
                pass
        assert len(stream.output().token_ids) == 60
        assert await drained == 0

    serving(engine, test)


def test_what_a_drain_does_not_see_end_fails(engine):
    before = held_bytes(engine)

    async def test(service, notes):
        stream = await service.open(call(1000))
        await anext(stream)
        assert await service.drain(0.05) == 1
        with pytest.raises(ServiceError) as caught:
            async for _ in stream:
                pass
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        stream.close()

    serving(engine, test)
    assert held_bytes(engine) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_engine_fails_every_stream():
    engine = checked_engine()
    told = []

    async def test(service, notes):
        service.on_failure(lambda: told.append(service.live))
        seats = 2 * engine.config.max_num_seqs
        streams = [await service.open(call(900, (5, i))) for i in range(seats + 3)]
        await anext(streams[0])

        def broken():
            raise AssertionError("the ledger is off")

        engine._loop.step = broken
        for stream in streams:
            with pytest.raises(ServiceError, match="the ledger is off") as caught:
                async for _ in stream:
                    pass
            assert caught.value.kind is ErrorKind.INTERNAL
            stream.close()
        assert told == [False]
        assert not service.ready
        for work in (service.open(call()), service.resize(Tenant("a", True), device_memory=1)):
            with pytest.raises(ServiceError) as caught:
                await work
            assert caught.value.kind is ErrorKind.UNAVAILABLE

    notes = Notes()

    async def main():
        service = Service(engine, ServeConfig(), notes)
        await asyncio.wait_for(test(service, notes), WAIT_S)
        await service.close()

    asyncio.run(main())
    kinds = {entry[2] for entry in notes.said if entry[0] == "finished"}
    assert kinds == {ErrorKind.INTERNAL}
    wait_until(lambda: not engine.alive)
