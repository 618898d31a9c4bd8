"""gRPC where clients take what there is: checks of health are answered all the same."""

import contextlib
import threading
from collections import Counter

import pytest

pytest.importorskip("grpc_status", reason="serving needs pip install 'ellm-jax[serve]'")

import grpc
from engine_requests import wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_server import ADMIN_KEY, WAIT_S, RunningGrpc, checked_engine, endless, request

from ellm_jax.protocol.v1 import ellm_pb2 as pb
from ellm_jax.serving.errors import ErrorKind
from ellm_jax.serving.grpc import places
from ellm_jax.serving.observer import NullObserver

KEYS = {"alice": "alice-key-0123456789"}
ALICE = [("authorization", f"Bearer {KEYS['alice']}")]
ASKED = health_pb2.HealthCheckRequest()
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def engine():
    with checked_engine() as engine:
        yield engine


class Refusals(NullObserver):
    """Counts what it is told of."""

    def __init__(self):
        self.by_kind = Counter()
        self.tenants = set()

    def on_refused(self, error, tenant):
        self.by_kind[error.kind] += 1
        self.tenants.add(tenant.name)


@contextlib.contextmanager
def health_of(server):
    with grpc.insecure_channel(server.address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def code_of(call):
    """The code that a call ends with; None if it gives something."""
    try:
        next(call)
    except grpc.RpcError as error:
        return error.code()
    return None


def test_watch_needs_a_key_and_check_does_not(engine):
    with RunningGrpc(engine, api_keys=KEYS) as server, health_of(server) as health:
        assert health.Check(ASKED, timeout=WAIT_S).status == SERVING
        refused = code_of(health.Watch(ASKED, timeout=WAIT_S))
        assert refused == grpc.StatusCode.UNAUTHENTICATED
        watch = health.Watch(ASKED, metadata=ALICE, timeout=WAIT_S)
        assert next(watch).status == SERVING
        watch.cancel()


def test_watches_have_a_bound_and_leave_their_places(engine):
    with RunningGrpc(engine, max_connections=8) as server, health_of(server) as health:
        watches = [health.Watch(ASKED) for _ in range(places.WATCHES_MAX)]
        assert [next(watch).status for watch in watches] == [SERVING] * len(watches)
        refused = code_of(health.Watch(ASKED, timeout=WAIT_S))
        assert refused == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert health.Check(ASKED, timeout=WAIT_S).status == SERVING
        with server.stub() as stub:
            assert stub.Generate(request(max_tokens=2), timeout=WAIT_S).completions
        for watch in watches:
            watch.cancel()
        wait_until(lambda: code_of(health.Watch(ASKED, timeout=WAIT_S)) is None, WAIT_S)


def test_health_answers_while_calls_have_all_places(engine):
    with (
        RunningGrpc(engine, max_connections=4) as server,
        health_of(server) as health,
        server.stub() as stub,
    ):
        streams = [stub.GenerateStream(endless()) for _ in range(4)]
        for stream in streams:
            next(stream)
        with grpc.insecure_channel(server.address) as channel:
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            full = code_of(reflection.ServerReflectionInfo(iter([asked]), timeout=WAIT_S))
        assert full == grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.RpcError, match="4 calls run"):
            stub.Generate(request(max_tokens=2), timeout=WAIT_S)
        assert health.Check(ASKED, timeout=WAIT_S).status == SERVING
        for stream in streams:
            stream.cancel()
        wait_until(lambda: server.call(lambda: server.service.stats().open_streams) == 0)
        assert stub.Generate(request(max_tokens=2), timeout=WAIT_S).completions


@pytest.mark.parametrize("method", [places.CHECK, "/ellm.v1.EngineService/GenerateStream"])
def test_a_call_without_a_message_does_not_last(engine, monkeypatch, method):
    monkeypatch.setattr(places, "_CHECK_S", 0.1)
    monkeypatch.setattr(places, "_REQUEST_S", 0.1)
    never = threading.Event()

    def nothing():
        never.wait(WAIT_S)
        yield from ()

    with (
        RunningGrpc(engine, max_connections=4) as server,
        grpc.insecure_channel(server.address) as channel,
        server.stub() as stub,
    ):
        idle = [channel.stream_stream(method)(nothing(), timeout=WAIT_S) for _ in range(4)]
        assert [code_of(call) for call in idle] == [grpc.StatusCode.INVALID_ARGUMENT] * 4
        assert stub.Generate(request(max_tokens=2), timeout=WAIT_S).completions
        never.set()


def test_every_refusal_is_told_once(engine):
    refusals = Refusals()
    with RunningGrpc(engine, refusals, api_keys=KEYS) as server, server.stub() as stub:
        for call, message, metadata in (
            (stub.Generate, request(), []),
            (stub.Generate, request(temperature=-1), ALICE),
            (stub.Sleep, pb.SleepRequest(), ALICE),
            (stub.Detokenize, pb.DetokenizeRequest(token_ids=[2**31]), ALICE),
        ):
            with pytest.raises(grpc.RpcError):
                call(message, metadata=metadata, timeout=WAIT_S)
        batch = pb.GenerateBatchRequest(requests=[request(temperature=-1), request(max_tokens=1)])
        assert len(list(stub.GenerateBatch(batch, metadata=ALICE, timeout=WAIT_S))) == 2
        assert refusals.by_kind == {
            ErrorKind.UNAUTHENTICATED: 1,
            ErrorKind.FORBIDDEN: 1,
            ErrorKind.INVALID: 3,
        }
        assert refusals.tenants == {"anonymous", "alice"}
        admin = [("authorization", f"Bearer {ADMIN_KEY}")]
        assert stub.GetModel(pb.GetModelRequest(), metadata=admin, timeout=WAIT_S).max_model_len
