"""How a server ends: drained, told twice, or with an engine that has failed."""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("grpc_status", reason="serving needs pip install 'ellm-jax[serve]'")

import grpc
from engine_requests import wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_server import WAIT_S, RunningServe, checked_engine, endless, held_bytes, request

from ellm_jax.protocol.v1 import ellm_pb2 as pb
from ellm_jax.protocol.v1 import ellm_pb2_grpc

OPTIONS = ["--grpc", "127.0.0.1:0", "--json", "--quiet", "--no-warm-up", "--device-memory", "64MiB"]
RED_S = 2.0
"""How soon everybody can see that the engine has failed."""
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def engine():
    with checked_engine() as engine:
        yield engine


class Reader:
    """Reads a stream on a thread.

    Attributes:
        tokens: how many have come.
        error: what it ended with; None if all is well.
    """

    def __init__(self, stub, message):
        self.tokens, self.error = 0, None
        self.begun = threading.Event()
        self._call = stub.GenerateStream(message)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:
            for part in self._call:
                self.tokens += sum(len(delta.token_ids) for delta in part.deltas)
                self.begun.set()
        except grpc.RpcError as error:
            self.error = error
        self.begun.set()

    def join(self):
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "a stream hangs"


def health_becomes(channel, status, within_s=WAIT_S):
    stub = health_pb2_grpc.HealthStub(channel)
    end = time.monotonic() + within_s
    while stub.Check(health_pb2.HealthCheckRequest()).status != status:
        assert time.monotonic() < end, "health did not change"
        time.sleep(0.02)


def in_the_server(stub):
    """How many requests were admitted and are not over."""
    answer = stub.GetMemory(pb.GetMemoryRequest())
    return answer.running + answer.waiting + answer.offloaded


def test_a_drain_under_load_loses_nothing(engine):
    server = RunningServe(engine, drain_s=WAIT_S)
    with grpc.insecure_channel(server.addresses["grpc"]) as channel:
        health_becomes(channel, SERVING)
        stub = ellm_pb2_grpc.EngineServiceStub(channel)
        lengths = [500 + 20 * i for i in range(20)]  # more than the engine is given at once
        readers = [Reader(stub, endless(length)) for length in lengths]
        wait_until(lambda: in_the_server(stub) == len(lengths), WAIT_S)
        server.stop()
        health_becomes(channel, NOT_SERVING)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Generate(request())
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        for reader in readers:
            reader.join()
        assert [(reader.tokens, reader.error) for reader in readers] == [
            (length, None) for length in lengths
        ]
    assert server.join() == 0


def test_what_does_not_end_in_time_ends_with_an_error(engine):
    before = held_bytes(engine)
    server = RunningServe(engine, drain_s=0.1)
    with grpc.insecure_channel(server.addresses["grpc"]) as channel:
        stub = ellm_pb2_grpc.EngineServiceStub(channel)
        readers = [Reader(stub, endless(n=4)) for _ in range(12)]
        wait_until(lambda: in_the_server(stub) == 4 * len(readers), WAIT_S)
        server.stop()
        for reader in readers:
            reader.join()
            assert reader.error is not None
            assert reader.error.code() == grpc.StatusCode.UNAVAILABLE
    assert server.join() == 0
    assert held_bytes(engine) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_engine_turns_health_red_and_fails_streams():
    engine = checked_engine()
    server = RunningServe(engine, http="127.0.0.1:0", linger_s=3.0)
    with grpc.insecure_channel(server.addresses["grpc"]) as channel:
        stub = ellm_pb2_grpc.EngineServiceStub(channel)
        readers = [Reader(stub, endless()) for _ in range(20)]
        wait_until(lambda: in_the_server(stub) == len(readers), WAIT_S)

        def broken():
            raise AssertionError("the ledger is off")

        engine._loop.step = broken
        health_becomes(channel, NOT_SERVING, RED_S)
        host, port = server.addresses["http"].rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 503
        connection.close()
        for reader in readers:
            reader.join()
            assert reader.error is not None
            assert reader.error.code() == grpc.StatusCode.INTERNAL
            assert "the ledger is off" in reader.error.details()
        with pytest.raises(grpc.RpcError) as refused:
            stub.Generate(request())
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert server.join() == 1


@contextlib.contextmanager
def command(*arguments):
    """`ellm serve` in a process of its own, with its gRPC address."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "ellm_jax",
            "serve",
            "--grpc",
            "127.0.0.1:0",
            *OPTIONS,
            *arguments,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = json.loads(process.stdout.readline())["grpc"]
        with grpc.insecure_channel(address) as channel:
            yield process, channel, ellm_pb2_grpc.EngineServiceStub(channel)
    finally:
        process.kill()
        process.wait(WAIT_S)


def test_a_signal_drains_the_process():
    with command() as (process, _, stub):
        reader = Reader(stub, endless(300))
        reader.begun.wait(WAIT_S)
        process.send_signal(signal.SIGTERM)
        reader.join()
        assert (reader.tokens, reader.error) == (300, None)
        assert process.wait(WAIT_S) == 0


def test_a_second_signal_ends_it_at_once():
    with command("--drain-s", "600") as (process, channel, stub):
        readers = [Reader(stub, endless(n=8)) for _ in range(16)]
        wait_until(lambda: in_the_server(stub) == 8 * len(readers), WAIT_S)
        process.send_signal(signal.SIGTERM)
        health_becomes(channel, NOT_SERVING)
        process.send_signal(signal.SIGTERM)
        for reader in readers:
            reader.join()
        assert any(reader.error is not None for reader in readers)
        assert process.wait(WAIT_S) == 130
