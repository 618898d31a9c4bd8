"""gRPC with keys: who may call what."""

import pytest

pytest.importorskip("grpc_status", reason="serving needs pip install 'ellm-jax[serve]'")

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_server import ADMIN_KEY, RunningGrpc, checked_engine, failure, request

from ellm_jax.protocol.v1 import ellm_pb2 as pb

SERVICE = "ellm.v1.EngineService"
METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["EngineService"].methods]
KEYS = {"alice": "alice-key-0123456789", "bob": "bob-key-0123456789ab"}


@pytest.fixture(scope="module")
def engine():
    with checked_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def guarded(engine):
    with RunningGrpc(engine, api_keys=KEYS) as server:
        yield server


def bearer(key):
    return [("authorization", f"Bearer {key}")]


@pytest.mark.parametrize("method", [*METHODS, "NoSuchMethod"])
@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "Bearer wrong-key-0123456789")],
        [("authorization", "Bearer ")],
        [("authorization", "Basic alice-key-0123456789")],
        [("authorization", "Bearer alice-key-0123456789x")],
        [("authorization", "Bearer alice-key-0123456789")] * 2,
    ],
)
def test_no_method_goes_without_a_key(method, metadata, guarded):
    with grpc.insecure_channel(guarded.address) as channel:
        call = channel.unary_stream(f"/{SERVICE}/{method}")
        error, details = failure(lambda: list(call(b"", metadata=metadata, timeout=30)))
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    assert details["ErrorInfo"].reason == "UNAUTHENTICATED"


def test_health_goes_without_and_reflection_does_not(guarded):
    with grpc.insecure_channel(guarded.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        error, _ = failure(lambda: list(reflection.ServerReflectionInfo(iter([asked]))))
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED


def test_tenants_may_generate_and_only_the_admin_may_change_limits(guarded, engine):
    limit = engine.memory().limit_bytes
    with guarded.stub() as stub:
        for key in (*KEYS.values(), ADMIN_KEY):
            answer = stub.Generate(request(max_tokens=2), metadata=bearer(key))
            assert answer.completions
        for method, message in (
            (stub.Resize, pb.ResizeRequest(device_memory_bytes=48 << 20)),
            (stub.Sleep, pb.SleepRequest()),
            (stub.Wake, pb.WakeRequest()),
        ):
            bob = bearer(KEYS["bob"])
            error, _ = failure(lambda m=method, a=message, b=bob: m(a, metadata=b))
            assert error.code() == grpc.StatusCode.PERMISSION_DENIED
        assert engine.memory().limit_bytes == limit
        admin = bearer(ADMIN_KEY)
        small = pb.ResizeRequest(device_memory_bytes=48 << 20)
        assert stub.Resize(small, metadata=admin).memory.limit_bytes == 48 << 20
        tiny = pb.ResizeRequest(device_memory_bytes=1)
        error, details = failure(lambda: stub.Resize(tiny, metadata=admin))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert details["BadRequest"].field_violations[0].field == "device_memory"
        stub.Sleep(pb.SleepRequest(), metadata=admin)
        assert engine.asleep
        stub.Wake(pb.WakeRequest(), metadata=admin)
        back = pb.ResizeRequest(device_memory_bytes=limit)
        stub.Resize(back, metadata=admin)
        assert engine.memory().limit_bytes == limit


def test_without_keys_nobody_is_admin_but_who_has_that_key(engine):
    with RunningGrpc(engine) as server, server.stub() as stub:
        error, _ = failure(lambda: stub.Sleep(pb.SleepRequest()))
        assert error.code() == grpc.StatusCode.PERMISSION_DENIED
        stub.Wake(pb.WakeRequest(), metadata=bearer(ADMIN_KEY))
