"""Clients that leave at any phase: afterwards the ledger is what it was."""

import contextlib
import random
import threading

import pytest

pytest.importorskip("grpc", reason="serving needs pip install 'ellm-jax[serve]'")

import grpc
from engine_requests import wait_until
from grpc_server import RunningGrpc, checked_engine, held_bytes, request

from ellm_jax.protocol.v1 import ellm_pb2 as pb
from ellm_jax.protocol.v1 import ellm_pb2_grpc

SEED = 20_260
CLIENTS = 12


class Leaver:
    """A client that makes calls and leaves them, each in its own way."""

    def __init__(self, address, seed, count):
        self._address = address
        self._rng = random.Random(seed)
        self._count = count
        self.finished = 0

    def run(self):
        ways = [self.at_once, self.soon, self.after_some, self.by_deadline, self.with_the_channel]
        ways += [self.in_a_batch, self.never]
        for _ in range(self._count):
            with (
                grpc.insecure_channel(self._address) as channel,
                contextlib.suppress(grpc.RpcError),
            ):
                stub = ellm_pb2_grpc.EngineServiceStub(channel)
                self._rng.choice(ways)(stub, channel)

    def message(self):
        rng = self._rng
        prompt = [rng.randrange(3, 2000) for _ in range(rng.choice([1, 30, 300]))]
        if rng.random() < 0.3:
            prompt = [7] * len(prompt)  # prefixes that are shared
        return request(
            prompt,
            max_tokens=rng.choice([1, 20, 400]),
            n=rng.choice([1, 1, 1, 3]),
            ignore_eos=True,
            temperature=rng.choice([0.0, 1.0]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        )

    def at_once(self, stub, channel):
        stub.GenerateStream(self.message()).cancel()

    def soon(self, stub, channel):
        call = stub.Generate.future(self.message())
        threading.Event().wait(self._rng.random() * 0.1)
        call.cancel()

    def after_some(self, stub, channel):
        call = stub.GenerateStream(self.message())
        for _ in range(self._rng.randrange(1, 20)):
            next(call, None)
        call.cancel()

    def by_deadline(self, stub, channel):
        list(stub.GenerateStream(self.message(), timeout=self._rng.random() * 0.2))

    def with_the_channel(self, stub, channel):
        call = stub.GenerateStream(self.message())
        next(call)
        channel.close()

    def in_a_batch(self, stub, channel):
        messages = [self.message() for _ in range(4)]
        call = stub.GenerateBatch(pb.GenerateBatchRequest(requests=messages))
        next(call)
        call.cancel()

    def never(self, stub, channel):
        parts = list(stub.GenerateStream(self.message()))
        assert parts[-1].HasField("usage")
        self.finished += 1


@pytest.mark.slow
def test_calls_left_at_any_phase_leave_nothing(request):
    cancels = request.config.getoption("--cancels")
    print(f"seed {SEED}, {cancels} calls")
    with (
        checked_engine(host_memory="8MiB", device_memory="16MiB") as engine,
        RunningGrpc(engine, max_queue=24) as server,
    ):
        before = held_bytes(engine)
        host = engine.memory().host_used_bytes
        each = -(-cancels // CLIENTS)
        leavers = [Leaver(server.address, SEED + i, each) for i in range(CLIENTS)]
        threads = [threading.Thread(target=leaver.run) for leaver in leavers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(500)
            assert not thread.is_alive(), "a call hangs"
        wait_until(lambda: server.call(lambda: server.service.stats().open_streams) == 0)
        assert held_bytes(engine) == before
        assert engine.memory().host_used_bytes == host
        assert server.call(lambda: server.service.stats().queued) == 0
        with server.stub() as stub:
            assert stub.Generate(pb.GenerateRequest(text="Once")).completions
