"""gRPC through the official stubs, over a real server with the package's small model."""

import contextlib
import json
import re
import threading

import pytest

pytest.importorskip("grpc_status", reason="serving needs pip install 'ellm-jax[serve]'")

import grpc
from engine_requests import wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_server import (
    RunningGrpc,
    checked_engine,
    endless,
    failure,
    held_bytes,
    request,
    wait_idle,
)

from ellm_jax import SamplingParams
from ellm_jax.protocol.v1 import ellm_pb2 as pb
from ellm_jax.protocol.v1 import ellm_pb2_grpc

PROMPT = "Once upon a time"
SERVICE = "ellm.v1.EngineService"
METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["EngineService"].methods]


@pytest.fixture(scope="module")
def engine():
    with checked_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine):
    with RunningGrpc(engine) as server:
        yield server


@pytest.fixture
def stub(server, engine):
    with server.stub() as stub:
        yield stub
    wait_idle(engine)


SEEDED = {"temperature": 0.9, "seed": 11, "max_tokens": 24}


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0, "max_tokens": 20},
        {**SEEDED},
        {**SEEDED, "n": 3, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
        {**SEEDED, "logprobs": 4, "prompt_logprobs": 2},
        {**SEEDED, "stop": [" the", "."]},
        {**SEEDED, "stop": ["."], "include_stop_str_in_output": True, "min_tokens": 6},
        {**SEEDED, "stop_token_ids": [262, 15]},
        {**SEEDED, "logit_bias": {262: -100.0, 15: 3.5}},
        {**SEEDED, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 0, "max_tokens": 30, "skip_special_tokens": False, "ignore_eos": True},
        {**SEEDED, "seed": -5, "top_k": -1},
    ],
)
def test_answers_are_those_of_the_engine(sampling, stub, engine):
    expected = engine.generate(PROMPT, SamplingParams(**sampling))[0]
    whole = stub.Generate(request(**sampling))
    parts = list(stub.GenerateStream(request(**sampling)))
    assert tuple(whole.prompt_token_ids) == expected.prompt_token_ids
    assert len(whole.completions) == len(expected.outputs)
    for own, theirs in zip(whole.completions, expected.outputs, strict=True):
        assert own.text == theirs.text
        assert tuple(own.token_ids) == theirs.token_ids
        assert pb.FinishReason.Name(own.finish_reason).endswith(theirs.finish_reason.upper())
        kind = own.WhichOneof("stopped_by")
        assert (None if kind is None else getattr(own, kind)) == theirs.stop_reason
        deltas = [d for part in parts for d in part.deltas if d.index == own.index]
        assert "".join(d.text for d in deltas) == own.text
        assert [t for d in deltas for t in d.token_ids] == list(own.token_ids)
        assert deltas[-1].finish_reason == own.finish_reason
        assert all(d.finish_reason == pb.FINISH_REASON_UNSPECIFIED for d in deltas[:-1])
        entries = [(e.token_id, e.rank) for e in theirs.logprobs or ()]
        assert [(e.token_id, e.rank) for e in own.logprobs] == entries
        assert [(e.token_id, e.rank) for d in deltas for e in d.logprobs] == entries
        for sent, entry in zip(own.logprobs, theirs.logprobs or (), strict=True):
            assert sent.logprob == pytest.approx(entry.logprob, abs=1e-5)
            assert [t.token_id for t in sent.top] == [token for token, _ in entry.top]
    if expected.prompt_logprobs is not None:
        ranks = [0 if e is None else e.rank for e in expected.prompt_logprobs]
        assert [e.rank for e in whole.prompt_logprobs] == ranks
        assert [e.rank for part in parts for e in part.prompt_logprobs] == ranks
    total = sum(len(each.token_ids) for each in expected.outputs)
    assert parts[0].request_id
    assert [part.HasField("usage") for part in parts] == [False] * (len(parts) - 1) + [True]
    for usage in (whole.usage, parts[-1].usage):
        assert usage.prompt_tokens == len(expected.prompt_token_ids)
        assert usage.completion_tokens == total
        assert 0 < usage.ttft_ms <= usage.e2e_ms


@pytest.mark.parametrize(
    ("form", "valid"),
    [
        (pb.Structured(regex="[0-9]{3}-[0-9]{2}"), lambda t: re.fullmatch("[0-9]{3}-[0-9]{2}", t)),
        (pb.Structured(choice=pb.Choices(texts=["yes", "no"])), lambda t: t in ("yes", "no")),
        (pb.Structured(grammar='start: "a"~3 "b"'), lambda t: t == "aaab"),
        (
            pb.Structured(json_schema='{"enum": ["one", "two"]}'),
            lambda t: json.loads(t) in ("one", "two"),
        ),
    ],
)
def test_structured_output_has_its_form(form, valid, stub):
    asked = {"max_tokens": 40, "seed": 4, "temperature": 1.0}
    text = stub.Generate(request(structured=form, **asked)).completions[0].text
    assert valid(text), text


@pytest.mark.parametrize(
    "form",
    [
        pb.Structured(),
        pb.Structured(json_schema="{"),
        pb.Structured(regex="(["),
        pb.Structured(grammar="nonsense"),
        pb.Structured(choice=pb.Choices()),
        pb.Structured(json_schema='{"x": ' * 101 + "1" + "}" * 101),
        pb.Structured(json_schema='{"x": ' * 40 + "1" + "}" * 40),
        pb.Structured(regex="a" * (64 * 2**10 + 1)),
        pb.Structured(choice=pb.Choices(texts=["a" * 2**10] * 65)),
    ],
)
def test_a_form_that_cannot_be_is_an_invalid_argument(form, stub):
    error, details = failure(lambda: stub.Generate(request(structured=form)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "sampling.structured"


def test_unlimited_goes_to_the_end_of_the_context(stub, engine):
    ids = list(range(20, 20 + engine.max_model_len - 10))
    answer = stub.Generate(request(ids, unlimited=True, ignore_eos=True))
    assert len(answer.completions[0].token_ids) == 10
    error, _ = failure(lambda: stub.Generate(request(unlimited=True, max_tokens=3)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_batch_answers_each_and_says_which_cannot_be(stub, engine):
    prompts = ["Once", "The little fox", [9_999_999], "One day", ""]
    asked = pb.GenerateBatchRequest(requests=[request(p, max_tokens=8) for p in prompts])
    answers = {answer.index: answer for answer in stub.GenerateBatch(asked)}
    assert sorted(answers) == list(range(len(prompts)))
    for index in (0, 1, 3):
        expected = engine.generate(prompts[index], SamplingParams(max_tokens=8, temperature=0))
        assert answers[index].response.completions[0].text == expected[0].text
    for index in (2, 4):
        assert answers[index].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert answers[index].error.field == "prompt"


def test_a_batch_cancelled_midway_leaves_nothing(stub, engine):
    before = held_bytes(engine)
    call = stub.GenerateBatch(pb.GenerateBatchRequest(requests=[endless(i + 1) for i in range(40)]))
    next(call)
    call.cancel()
    wait_idle(engine)
    assert held_bytes(engine) == before


def test_tokens_and_texts(stub, engine):
    text = "Once upon a time, a café: 你好"
    ids = list(stub.Tokenize(pb.TokenizeRequest(text=text)).token_ids)
    assert ids == engine.tokenizer.encode(text)
    plain = stub.Tokenize(pb.TokenizeRequest(text=text, add_special_tokens=False))
    assert list(plain.token_ids) == engine.tokenizer.encode(text, False)
    back = stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))
    assert back.text == engine.tokenizer.decode(ids)
    kept = stub.Detokenize(pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=False))
    assert kept.text == engine.tokenizer.decode(ids, False)


def test_the_model_and_the_memory(stub, engine):
    model = stub.GetModel(pb.GetModelRequest())
    assert (model.name, model.family, model.has_tokenizer) == ("small", "llama", True)
    assert model.max_model_len == engine.max_model_len
    memory = stub.GetMemory(pb.GetMemoryRequest()).memory
    owners = ("free", "kv", "cache", "activation", "weights", "workspace")
    assert sum(getattr(memory, f"{owner}_bytes") for owner in owners) == memory.limit_bytes
    assert memory.weights_bytes == engine.memory().weights_bytes


def test_health_and_reflection_answer_the_standard_stubs(server, stub):
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        unknown, _ = failure(lambda: health.Check(health_pb2.HealthCheckRequest(service="no")))
        assert unknown.code() == grpc.StatusCode.NOT_FOUND
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, described = reflection.ServerReflectionInfo(iter(asked))
        names = {service.name for service in listed.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names
        files = described.file_descriptor_response.file_descriptor_proto
        assert pb.DESCRIPTOR.serialized_pb in files


BAD = [
    (dict(temperature=-1), "sampling.temperature"),
    (dict(temperature=float("nan")), "sampling.temperature"),
    (dict(top_p=0), "sampling.top_p"),
    (dict(top_k=-2), "sampling.top_k"),
    (dict(n=0), "sampling.n"),
    (dict(n=17), "sampling.n"),
    (dict(n=2**32 - 1), "sampling.n"),
    (dict(max_tokens=0), "sampling.max_tokens"),
    (dict(max_tokens=4, min_tokens=5), "sampling.min_tokens"),
    (dict(logprobs=21), "sampling.logprobs"),
    (dict(prompt_logprobs=21), "sampling.prompt_logprobs"),
    (dict(stop=[""]), "sampling.stop"),
    (dict(stop=["x"] * 17), "sampling.stop"),
    (dict(stop=["x" * 257]), "sampling.stop"),
    (dict(stop_token_ids=list(range(17))), "sampling.stop_token_ids"),
    (dict(logit_bias={5: 101.0}), "sampling.logit_bias"),
    (dict(logit_bias={2**31: 1.0}), "sampling.logit_bias"),
    (dict(logit_bias={2047 + 5: 1.0}), "sampling.logit_bias"),
    (dict(logit_bias={i: 1.0 for i in range(1025)}), "sampling.logit_bias"),
    (dict(repetition_penalty=0), "sampling.repetition_penalty"),
    (dict(prompt=""), "prompt"),
    (dict(prompt=[]), "prompt"),
    (dict(prompt=[2048]), "prompt"),
    (dict(prompt=[2**32 - 1]), "prompt"),
    (dict(prompt=[5] * 1024), "prompt"),
    (dict(prompt="word " * 5000), "prompt"),
    (dict(request_id="no spaces"), "request_id"),
    (dict(request_id="x" * 129), "request_id"),
]


@pytest.mark.parametrize(("asked", "field"), BAD)
def test_what_makes_no_sense_is_an_invalid_argument_with_its_field(asked, field, stub, engine):
    before = held_bytes(engine)
    message = request(**asked)
    for call in (stub.Generate, lambda message: list(stub.GenerateStream(message))):
        error, details = failure(lambda call=call: call(message))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error.details()
        assert details["BadRequest"].field_violations[0].field == field, error.details()
        assert details["ErrorInfo"].domain == "ellm_jax"
    assert held_bytes(engine) == before


@pytest.mark.parametrize(
    "message",
    [
        pb.GenerateRequest(),
        pb.GenerateRequest(text="x", priority=-1),
        pb.GenerateRequest(text="x", priority=1001),
        pb.GenerateRequest(text="x", ttft_ms=-1),
        pb.GenerateRequest(text="x", tpot_ms=float("inf")),
    ],
)
def test_options_have_bounds_too(message, stub):
    error, details = failure(lambda: stub.Generate(message))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations


@pytest.mark.parametrize("count", [0, 257])
def test_batches_have_a_bound(count, stub):
    asked = pb.GenerateBatchRequest(requests=[request("x")] * count)
    error, details = failure(lambda: list(stub.GenerateBatch(asked)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "requests"


def test_detokenize_has_bounds(stub, engine):
    for ids in ([2048], [5] * (engine.max_model_len + 1)):
        error, _ = failure(lambda ids=ids: stub.Detokenize(pb.DetokenizeRequest(token_ids=ids)))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "raw",
    [
        b"\x0a\x02\xff\xfe",  # text that is no UTF-8
        b"\x1a\x04\x6a\x02\xc3\x28",  # a stop string that is none
        b"\x0a\x7f",  # shorter than it says
        b"\xff" * 50,
        request("x").SerializeToString() + b"\xf8\x7f\x01",  # a field that nobody knows
        b"\x0a\x01x\x1a\x03\xf8\x7f\x01",  # one inside of sampling
    ],
)
def test_what_is_no_message_is_an_invalid_argument(raw, server, stub):
    with grpc.insecure_channel(server.address) as channel:
        for method in ("Generate", "GenerateStream"):
            call = channel.unary_stream(f"/{SERVICE}/{method}")
            error, _ = failure(lambda call=call: list(call(raw)))
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error.details()
    assert stub.Generate(request(max_tokens=2)).completions


def test_what_is_too_large_is_refused_unread(server, stub):
    huge = request("x" * (4 * 2**20 + 1))
    error, _ = failure(lambda: stub.Generate(huge))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = [("x-large", "x" * 40_000)]
    error, _ = failure(lambda: stub.GetModel(pb.GetModelRequest(), metadata=metadata))
    assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL)
    assert stub.Generate(request(max_tokens=2)).completions


def test_cancelling_gives_memory_back(server, stub, engine):
    before = held_bytes(engine)
    call = stub.GenerateStream(endless())
    next(call)
    assert engine.load().running
    call.cancel()
    wait_until(lambda: server.call(lambda: server.service.stats().open_streams) == 0)
    assert held_bytes(engine) == before


def test_a_deadline_gives_memory_back(server, stub, engine):
    before = held_bytes(engine)
    error, _ = failure(lambda: list(stub.GenerateStream(endless(), timeout=0.3)))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    error, _ = failure(lambda: stub.Generate(endless(n=8, logprobs=20), timeout=0.3))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: server.call(lambda: server.service.stats().open_streams) == 0)
    assert held_bytes(engine) == before


def test_a_request_id_that_runs_is_taken(stub):
    call = stub.GenerateStream(request([5], request_id="mine", max_tokens=1000, ignore_eos=True))
    assert next(call).request_id == "mine"
    error, details = failure(lambda: stub.Generate(request(request_id="mine")))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "request_id"
    call.cancel()


def test_many_streams_at_once_all_end(server, engine):
    count, tokens = 200, 12
    received: dict[int, int] = {}

    def read(index: int, stub) -> None:
        asked = request([5, 6 + index], max_tokens=tokens, ignore_eos=True)
        deltas = [d for part in stub.GenerateStream(asked) for d in part.deltas]
        received[index] = sum(len(d.token_ids) for d in deltas)

    with server.stub() as stub:
        threads = [threading.Thread(target=read, args=(i, stub)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
    assert received == dict.fromkeys(range(count), tokens)
    wait_idle(engine)


def test_a_full_queue_says_when_to_come_back(engine):
    seats = 2 * engine.config.max_num_seqs
    with RunningGrpc(engine, max_queue=2) as server, server.stub() as stub:
        calls = [stub.GenerateStream(endless()) for _ in range(seats + 2)]
        wait_until(lambda: server.call(lambda: server.service.stats().queued) == 2)
        error, details = failure(lambda: stub.Generate(request()))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details["RetryInfo"].retry_delay.seconds >= 1
        for call in calls:
            call.cancel()
        wait_until(lambda: server.call(lambda: server.service.stats().open_streams) == 0)
        assert stub.Generate(request(max_tokens=2)).completions


def test_a_client_that_does_not_read_is_let_go(engine):
    with RunningGrpc(engine, stall_s=0.2) as server, server.stub() as stub:
        before = held_bytes(engine)
        slow = stub.GenerateStream(endless(n=8, logprobs=20))
        next(slow)
        wait_until(lambda: server.call(lambda: server.service.stats().open_streams) == 0)
        assert stub.Generate(request(max_tokens=2)).completions
        assert held_bytes(engine) == before
        with contextlib.suppress(grpc.RpcError):
            slow.cancel()


def test_two_servers_do_not_share_an_address(server, engine):
    import asyncio

    from ellm_jax.serving.run import serve
    from ellm_jax.serving.settings import ServeConfig

    with pytest.raises(OSError, match="cannot listen"):
        asyncio.run(serve(engine, ServeConfig(grpc=server.address)))


def test_the_stub_and_the_definition_have_the_same_methods():
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        made = vars(ellm_pb2_grpc.EngineServiceStub(channel))
    assert sorted(made) == sorted(METHODS)
