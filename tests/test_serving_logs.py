"""Lines of JSON about calls, and the spans of a call's life, against what really ran."""

import asyncio
import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
from engine_requests import greedy
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ellm_jax.serving.call import Call
from ellm_jax.serving.errors import ServiceError
from ellm_jax.serving.logs import RequestLog, log_json, request_context
from ellm_jax.serving.observer import Observer
from ellm_jax.serving.observers import Observers
from ellm_jax.serving.service import Service
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.tenants import Tenant
from ellm_jax.serving.tracing import CallTracer

ANN = Tenant("ann")


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, object]]]]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    written = io.StringIO()
    log_json("info", written)
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    root.handlers[:], root.level = handlers, level


def serve(engine, observer: Observer, use) -> None:
    async def run() -> None:
        service = Service(engine, ServeConfig(max_n=2), observer)
        await use(service)
        await service.close()

    asyncio.run(asyncio.wait_for(run(), 120))


def test_a_line_for_every_call(tiny_checkpoint, make_engine, lines):
    engine = make_engine(tiny_checkpoint("llama"))

    async def use(service: Service) -> None:
        with request_context("from-a-client"):
            await service.complete(Call([11, 12, 13], greedy(7, n=2), ANN, request_id="mine"))
        with pytest.raises(ServiceError):
            await service.complete(Call([5], greedy(3, n=3), ANN))
        stream = service.stream(Call([5], greedy(90), ANN))
        await anext(stream)
        await stream.aclose()

    serve(engine, RequestLog(), use)
    complete, refused, left = (x for x in lines() if x["logger"] == "ellm_jax.requests")
    assert complete["level"] == "info"
    assert (complete["request_id"], complete["http_request_id"]) == ("mine", "from-a-client")
    assert (complete["tenant"], complete["outcome"]) == ("ann", "length")
    assert (complete["prompt_tokens"], complete["output_tokens"]) == (3, 14)
    assert 0 <= complete["queue_ms"] <= complete["ttft_ms"] <= complete["e2e_ms"]
    assert refused["level"] == left["level"] == "warning"
    assert (refused["outcome"], refused["reason"], refused["param"]) == (
        "refused",
        "too_large",
        "n",
    )
    assert (left["outcome"], left["reason"]) == ("abort", "cancelled")
    assert left["request_id"], "it was given none, and has one"
    assert "http_request_id" not in left


def test_a_line_is_one_line_whatever_is_in_it(lines):
    nasty = 'quote " newline \n return \r null \0 high \ud800 emoji \U0001f600'
    try:
        raise ValueError(nasty)
    except ValueError:
        logging.getLogger("some").exception("it said %s", nasty)
    (line,) = lines()
    assert line["message"] == f"it said {nasty}"
    assert line["logger"] == "some"
    assert "ValueError" in line["exception"]


def spans_by_name(spans: tuple[ReadableSpan, ...]) -> dict[str, list[ReadableSpan]]:
    found: dict[str, list[ReadableSpan]] = {}
    for span in spans:
        found.setdefault(span.name, []).append(span)
    return found


def test_spans_tell_a_calls_life(tiny_checkpoint, make_engine):
    """Calls in so little memory that some go to host memory and come back."""
    engine = make_engine(
        tiny_checkpoint("llama", context=1024),
        device_memory="10MiB",
        host_memory="16MiB",
        policy="elastic",
        max_num_seqs=12,
        max_batch_tokens=32,
    )
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = CallTracer(provider, engine.events)
    engine.watch_steps(tracer.on_step)
    outputs = []

    async def use(service: Service) -> None:
        calls = [Call([5, 6, i] * 30, greedy(250), ANN, request_id=f"r{i}") for i in range(12)]
        outputs.extend(await asyncio.gather(*(service.complete(each) for each in calls)))
        with pytest.raises(ServiceError):
            await service.complete(Call([5], greedy(900), ANN, request_id="late", deadline_s=0.05))

    serve(engine, Observers(tracer), use)
    engine.watch_steps(None)
    spans = exporter.get_finished_spans()
    roots = {span.attributes["ellm.request_id"]: span for span in spans if span.name == "request"}
    assert len(roots) == 13
    assert all(root.parent is None for root in roots.values())
    assert roots["late"].attributes["ellm.outcome"] == "deadline"
    assert not roots["late"].status.is_ok
    moves = 0
    for output in outputs:
        root = roots[output.request_id]
        mine = [s for s in spans if s.parent and s.context.trace_id == root.context.trace_id]
        found = spans_by_name(tuple(mine))
        assert all(span.parent.span_id == root.context.span_id for span in mine)
        (queue,), (prefill,), (decode,) = found["queue"], found["prefill"], found["decode"]
        assert queue.start_time == root.start_time
        assert queue.end_time == prefill.start_time
        assert prefill.end_time == decode.start_time <= decode.end_time <= root.end_time
        tokens = sum(step.attributes["ellm.tokens"] for step in found["prefill step"])
        # What was found is not computed; what was preempted is computed again.
        assert tokens >= 90 - output.metrics.cached_tokens
        if not output.metrics.num_preemptions:
            assert tokens == 90 - output.metrics.cached_tokens
        for step in found["prefill step"]:
            assert root.start_time <= step.start_time <= step.end_time <= root.end_time
        assert root.attributes["gen_ai.usage.output_tokens"] == 250
        for kind in ("offload", "fetch", "preempt"):
            real = [
                e for e in engine.events() if (e.kind, e.request_id) == (kind, output.request_id)
            ]
            assert len(found.get(kind, [])) == len(real)
            moves += len(real)
    assert moves > 0, "nothing moved: this tested little"
