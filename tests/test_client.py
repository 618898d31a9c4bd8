"""The typed client against a real server, and against one that fails in every way."""

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytest.importorskip("grpc", reason="the client needs pip install 'ellm-jax[client]'")

import grpc
from engine_requests import wait_until
from grpc_server import ADMIN_KEY, WAIT_S, RunningGrpc, checked_engine, held_bytes

from ellm_jax import SamplingParams
from ellm_jax.client import AsyncClient, Client, ClientError, Retries
from ellm_jax.protocol.v1 import ellm_pb2 as pb
from ellm_jax.protocol.v1 import ellm_pb2_grpc

PROMPT = "Once upon a time"
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=2**64 - 3, n=2, logprobs=2, stop="zz")


@pytest.fixture(scope="module")
def engine():
    with checked_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine):
    with RunningGrpc(engine) as server:
        yield server


def same(generation, expected):
    assert [c.text for c in generation.completions] == [c.text for c in expected.outputs]
    for own, theirs in zip(generation.completions, expected.outputs, strict=True):
        assert own.token_ids == theirs.token_ids
        assert own.finish_reason == theirs.finish_reason
        assert [e.rank for e in own.logprobs] == [e.rank for e in theirs.logprobs]
        assert own.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-4)
    assert generation.prompt_token_ids == expected.prompt_token_ids


def test_everything_that_the_engine_does(server, engine):
    expected = engine.generate(PROMPT, PARAMS)[0]
    with Client(server.address, timeout_s=WAIT_S) as client:
        same(client.generate(PROMPT, PARAMS), expected)
        parts = list(client.stream(PROMPT, PARAMS, request_id="mine"))
        assert {part.request_id for part in parts} == {"mine"}
        assert "".join(part.text for part in parts) == expected.text
        assert parts[-1].usage.completion_tokens == 24
        assert all(part.usage is None for part in parts[:-1])
        answers = dict(client.generate_batch([PROMPT, [10**9], [5, 6]], PARAMS))
        same(answers[0], expected)
        assert answers[1].code is grpc.StatusCode.INVALID_ARGUMENT
        assert answers[1].fields == ("prompt",)
        assert answers[2].prompt_token_ids == (5, 6)
        ids = client.tokenize(PROMPT)
        assert ids == engine.tokenizer.encode(PROMPT)
        assert client.detokenize(ids) == engine.tokenizer.decode(ids)
        assert client.model().max_model_len == engine.max_model_len
        assert client.memory().weights_bytes == engine.memory().weights_bytes
        with pytest.raises(ClientError) as caught:
            client.sleep()
        assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
        assert caught.value.reason == "FORBIDDEN"
        with pytest.raises(ClientError) as caught:
            client.generate(PROMPT, SamplingParams(n=100))
        assert caught.value.fields == ("sampling.n",)
    with Client(server.address, api_key=ADMIN_KEY) as admin:
        limit = engine.memory().limit_bytes
        assert admin.resize(device_memory_bytes=limit // 2).limit_bytes == limit // 2
        admin.sleep()
        assert engine.asleep
        admin.wake()
        admin.resize(device_memory_bytes=limit)


def test_the_same_without_blocking(server, engine):
    expected = engine.generate(PROMPT, PARAMS)[0]

    async def main():
        async with AsyncClient(server.address, timeout_s=WAIT_S) as client:
            same(await client.generate(PROMPT, PARAMS), expected)
            parts = [part async for part in client.stream(PROMPT, PARAMS)]
            assert "".join(part.text for part in parts) == expected.text
            answers = {i: a async for i, a in client.generate_batch([PROMPT, [10**9]], PARAMS)}
            same(answers[0], expected)
            assert isinstance(answers[1], ClientError)
            ids = await client.tokenize(PROMPT)
            assert await client.detokenize(ids) == engine.tokenizer.decode(ids)
            assert (await client.model()).name == "small"
            assert (await client.memory()).limit_bytes == engine.memory().limit_bytes
            many = await asyncio.gather(*(client.generate(PROMPT, PARAMS) for _ in range(20)))
            for each in many:
                same(each, expected)
        async with AsyncClient(server.address, api_key=ADMIN_KEY) as admin:
            await admin.sleep()
            await admin.wake()
            limit = engine.memory().limit_bytes
            assert (await admin.resize(device_memory_bytes=limit)).limit_bytes == limit

    asyncio.run(main())


def test_leaving_a_stream_cancels_it(server, engine):
    before = held_bytes(engine)
    long = SamplingParams(max_tokens=1000, ignore_eos=True)

    def idle():
        return server.call(lambda: server.service.stats().open_streams) == 0

    async def main():
        async with AsyncClient(server.address) as client:
            stream = client.stream(PROMPT, long)
            async for _ in stream:
                break
            await stream.aclose()
            await asyncio.to_thread(wait_until, idle)
            task = asyncio.create_task(client.generate(PROMPT, long))
            await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.to_thread(wait_until, idle)

    with Client(server.address) as client:
        stream = client.stream(PROMPT, long)
        next(stream)
        stream.close()
        wait_until(idle)
    asyncio.run(main())
    assert held_bytes(engine) == before


class Flaky(ellm_pb2_grpc.EngineServiceServicer):
    """Fails so many times, then answers; or fails after the first message of a stream."""

    def __init__(self, failures, code=grpc.StatusCode.UNAVAILABLE, after=0):
        self.calls, self.failures, self.code, self.after = 0, failures, code, after

    def Generate(self, request, context):  # noqa: N802
        self.calls += 1
        if self.calls <= self.failures:
            context.abort(self.code, "not now")
        return pb.GenerateResponse(request_id="done", completions=[pb.Completion(text="x")])

    def GenerateStream(self, request, context):  # noqa: N802
        self.calls += 1
        for index in range(self.after):
            yield pb.GenerateStreamResponse(deltas=[pb.Completion(text=str(index))])
        if self.calls <= self.failures:
            context.abort(self.code, "not now")
        yield pb.GenerateStreamResponse(deltas=[pb.Completion(text="end")])


@contextmanager
def serving(servicer):
    server = grpc.server(ThreadPoolExecutor(2))
    ellm_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait(WAIT_S)


QUICK = Retries(attempts=4, first_s=0.01)


def generate(address, retries, **more):
    with Client(address, retries=retries, **more) as client:
        return client.generate("x").text


def generate_async(address, retries, **more):
    async def main():
        async with AsyncClient(address, retries=retries, **more) as client:
            return (await client.generate("x")).text

    return asyncio.run(main())


def stream(address, retries, **more):
    with Client(address, retries=retries, **more) as client:
        return "".join(part.text for part in client.stream("x"))


def stream_async(address, retries, **more):
    async def main():
        async with AsyncClient(address, retries=retries, **more) as client:
            return "".join([part.text async for part in client.stream("x")])

    return asyncio.run(main())


WAYS = [generate, generate_async, stream, stream_async]


@pytest.mark.parametrize("way", WAYS)
def test_unavailable_is_tried_again(way):
    servicer = Flaky(3)
    with serving(servicer) as address:
        assert way(address, QUICK) in ("x", "end")
    assert servicer.calls == 4


@pytest.mark.parametrize("way", WAYS)
def test_tries_run_out(way):
    servicer = Flaky(99)
    with serving(servicer) as address, pytest.raises(ClientError) as caught:
        way(address, QUICK)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert servicer.calls == 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "code",
    [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED],
)
def test_other_errors_are_final(way, code):
    servicer = Flaky(99, code)
    with serving(servicer) as address, pytest.raises(ClientError) as caught:
        way(address, QUICK)
    assert caught.value.code is code
    assert servicer.calls == 1


@pytest.mark.parametrize("way", [stream, stream_async])
def test_a_stream_that_has_begun_is_not_begun_again(way):
    servicer = Flaky(1, after=2)
    with serving(servicer) as address, pytest.raises(ClientError) as caught:
        way(address, QUICK)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert servicer.calls == 1


@pytest.mark.parametrize("way", WAYS)
def test_time_runs_out_before_the_tries(way):
    servicer = Flaky(10**6)
    endless = Retries(attempts=10**6, first_s=0.2, max_s=0.2, random=lambda: 1.0)
    with serving(servicer) as address, pytest.raises(ClientError):
        way(address, endless, timeout_s=0.5)
    assert 1 < servicer.calls < 10


def test_pauses_double_have_jitter_and_heed_the_server():
    from ellm_jax.client.retries import Attempts

    class Failed(grpc.RpcError):
        def __init__(self, metadata=()):
            self._metadata = metadata

        def code(self):
            return grpc.StatusCode.UNAVAILABLE

        def details(self):
            return "not now"

        def trailing_metadata(self):
            return self._metadata

    attempts = Attempts(Retries(attempts=6, first_s=1, max_s=5, random=lambda: 0.5), None)
    assert [attempts.pause_s(Failed()) for _ in range(5)] == [0.5, 1.0, 2.0, 2.5, 2.5]
    with pytest.raises(ClientError):
        attempts.pause_s(Failed())

    from google.protobuf import any_pb2, duration_pb2
    from google.rpc import error_details_pb2, status_pb2

    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=3)))
    status = status_pb2.Status(code=14, message="not now", details=[packed])
    metadata = [("grpc-status-details-bin", status.SerializeToString())]
    attempts = Attempts(Retries(first_s=1, random=lambda: 0.5), None)
    assert attempts.pause_s(Failed(metadata)) == 3
    with pytest.raises(ValueError, match="attempts=0"):
        Retries(attempts=0)


def test_the_client_needs_neither_jax_nor_the_engine():
    code = (
        "import ellm_jax.client, sys; "
        "sys.exit(any(m in sys.modules for m in ('jax', 'numpy', 'ellm_jax.engine')))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
