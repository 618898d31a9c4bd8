"""Messages that no client would send: whatever they are, the answer is a status that says so, and
the engine goes on."""

import contextlib

import pytest

pytest.importorskip("grpc", reason="serving needs pip install 'ellm-jax[serve]'")

import grpc
from grpc_server import RunningGrpc, checked_engine, held_bytes, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ellm_jax.protocol.v1 import ellm_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["EngineService"]
ANSWERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.CANCELLED,  # by ourselves, after the first message
}
KINDS = {
    "uint32": st.sampled_from([0, 1, 2, 7, 2**31, 2**32 - 1]) | st.integers(0, 3000),
    "uint64": st.sampled_from([0, 1, 2**63, 2**64 - 1]),
    "int32": st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31)]) | st.integers(-5, 50),
    "int64": st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]),
    "double": st.floats() | st.sampled_from([0.0, 1.0, 0.5, -1.0]),
    "bool": st.booleans(),
    "string": st.text(max_size=40) | st.sampled_from(["", "x" * 5000, "[", "{", "a" * 200]),
}


def kind_of(field):
    """The name of a scalar field's type, as in KINDS."""
    return next(k for k in KINDS if getattr(field, f"TYPE_{k.upper()}") == field.type)


@st.composite
def messages(draw, descriptor):
    """A message of this type with any fields set, each to anything that its type holds."""
    message = getattr(pb, descriptor.name)()
    for field in descriptor.fields:
        if draw(st.integers(0, 2)):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            keys, values = (kind_of(part) for part in field.message_type.fields)
            entries = draw(st.dictionaries(KINDS[keys], KINDS[values], max_size=5))
            getattr(message, field.name).update(entries)
        elif field.message_type is not None:
            parts = draw(st.lists(messages(field.message_type), min_size=1, max_size=3))
            if field.is_repeated:
                getattr(message, field.name).extend(parts)
            else:
                getattr(message, field.name).CopyFrom(parts[0])
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(KINDS[kind_of(field)], max_size=20)))
        else:
            setattr(message, field.name, draw(KINDS[kind_of(field)]))
    return message


@st.composite
def calls(draw):
    """A method, and the bytes that it is sent: a message, one that was damaged, or noise."""
    method = draw(st.sampled_from(list(SERVICE.methods)))
    data = draw(messages(method.input_type)).SerializeToString()
    damage = draw(st.integers(0, 4))
    if damage == 0 and data:
        data = data[: draw(st.integers(0, len(data) - 1))]
    elif damage == 1 and data:
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    elif damage == 2:
        data += draw(st.binary(max_size=30))
    return method.name, data


@pytest.fixture(scope="module")
def server():
    with checked_engine() as engine, RunningGrpc(engine) as server:
        before = held_bytes(engine)
        yield server
        assert held_bytes(engine) == before
        with server.stub() as stub:
            assert stub.Generate(request(max_tokens=3)).completions


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(call=calls())
def test_any_bytes_are_answered(call, server):
    method, data = call
    with grpc.insecure_channel(server.address) as channel:
        answers = channel.unary_stream(f"/{SERVICE.full_name}/{method}")(data, timeout=60)
        with contextlib.suppress(grpc.RpcError):
            next(answers, None)
            answers.cancel()
        assert answers.code() in ANSWERS, f"{answers.code()}: {answers.details()}"
