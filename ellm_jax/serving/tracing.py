"""Traces: the life of a call as OpenTelemetry spans, sent when it is over.

A call is a span; its queueing, prefill (with a span per step), decoding, and its memory's ways to
the host tier and back are spans below it. Neither prompts nor answers are in them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ellm_jax.execution import DispatchedStep
from ellm_jax.memory.events import MemoryEvent
from ellm_jax.outputs import RequestMetrics, RequestOutput
from ellm_jax.serving.errors import ServiceError
from ellm_jax.serving.observers import outcome_of
from ellm_jax.serving.tenants import Tenant

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

    from ellm_jax.engine import Engine
    from ellm_jax.serving.call import Call

_STEPS_MAX = 64
"""Most prefill steps of a call that get a span; of more, the first ones do."""

_MOVES = ("offload", "fetch", "preempt")


@dataclass
class _Open:
    """A call that is not over; times on the monotonic clock.

    Attributes:
        steps: begin, end and tokens of its prefill steps; appended to by the engine's thread.
    """

    admitted_s: float
    prompt_tokens: int
    names: tuple[str, ...]
    metrics: RequestMetrics | None = None
    steps: list[tuple[float, float, int]] = field(default_factory=list)


class CallTracer:
    """An `Observer` that makes spans."""

    def __init__(
        self,
        provider: TracerProvider,
        events: Callable[[], list[MemoryEvent]],
        clock: Callable[[], float] = time.monotonic,
    ):
        """Args:
        provider: makes and sends the spans.
        events: the latest moves of memory; `Engine.events`.
        clock: seconds, monotonic; the engine's.
        """
        self._tracer = provider.get_tracer("ellm_jax")
        self._events = events
        self._clock = clock
        self._offset_s = time.time() - clock()
        self._open: dict[Call, _Open] = {}
        self._by_name: dict[str, _Open] = {}

    def on_step(self, step: DispatchedStep, end_s: float) -> None:
        """Takes in a step; on the engine's thread."""
        for share in step.plan.shares:
            entry = self._by_name.get(share.request.id)
            prefill = share.begin < len(share.request.prompt_ids)
            if entry is not None and prefill and len(entry.steps) < _STEPS_MAX:
                entry.steps.append((step.begin_s, end_s, share.count))

    def on_admitted(self, call: Call, prompt_tokens: int) -> None:
        """The trace begins here."""
        name, n = call.request_id, call.params.n
        names: tuple[str, ...] = ()
        if name is not None:
            names = (name,) if n == 1 else tuple(f"{name}/{i}" for i in range(n))
        entry = self._open[call] = _Open(self._clock(), prompt_tokens, names)
        self._by_name |= dict.fromkeys(names, entry)

    def on_refused(self, error: ServiceError, tenant: Tenant) -> None:
        """Nothing was done: there is nothing to trace."""

    def on_first_token(self, call: Call, metrics: RequestMetrics) -> None:
        """Keeps the times, for a call that ends without an output."""
        entry = self._open.get(call)
        if entry is not None:
            entry.metrics = metrics

    def on_finished(self, call: Call, outcome: RequestOutput | ServiceError) -> None:
        """Sends the spans."""
        entry = self._open.pop(call, None)
        if entry is None:
            return
        for name in entry.names:
            self._by_name.pop(name, None)
        end_s = self._clock()
        root = self._span("request", entry.admitted_s, None, self._attributes(call, entry, outcome))
        metrics = outcome.metrics if isinstance(outcome, RequestOutput) else entry.metrics
        self._phases(root, entry, metrics, end_s)
        for begin_s, done_s, tokens in entry.steps:
            self._span("prefill step", begin_s, root, {"ellm.tokens": tokens}, done_s)
        self._moves(root, entry)
        if isinstance(outcome, ServiceError):
            from opentelemetry.trace import Status, StatusCode

            root.set_status(Status(StatusCode.ERROR, outcome.message))
        root.end(self._ns(end_s))

    def _phases(
        self, root: Span, entry: _Open, metrics: RequestMetrics | None, end_s: float
    ) -> None:
        scheduled_s = None if metrics is None else metrics.first_scheduled_s
        first_s = None if metrics is None else metrics.first_token_s
        self._span("queue", entry.admitted_s, root, {}, scheduled_s or end_s)
        if scheduled_s is not None:
            self._span("prefill", scheduled_s, root, {}, first_s or end_s)
        if first_s is not None:
            finished_s = None if metrics is None else metrics.finished_s
            self._span("decode", first_s, root, {}, finished_s or end_s)

    def _moves(self, root: Span, entry: _Open) -> None:
        for event in self._events():
            mine = event.request_id in entry.names and event.time_s >= entry.admitted_s
            if mine and event.kind in _MOVES:
                begin_s = event.time_s - 1e-6 * event.us
                found = {"ellm.bytes": event.bytes, "ellm.cause": event.cause}
                self._span(event.kind, begin_s, root, found, event.time_s)

    def _attributes(
        self, call: Call, entry: _Open, outcome: RequestOutput | ServiceError
    ) -> dict[str, Any]:
        found: dict[str, Any] = {
            "ellm.tenant": call.tenant.name,
            "ellm.outcome": outcome_of(outcome),
            "gen_ai.usage.input_tokens": entry.prompt_tokens,
        }
        if call.request_id is not None:
            found["ellm.request_id"] = call.request_id
        if isinstance(outcome, RequestOutput):
            found |= {
                "gen_ai.usage.output_tokens": sum(len(c.token_ids) for c in outcome.outputs),
                "ellm.cached_tokens": outcome.metrics.cached_tokens,
                "ellm.preemptions": outcome.metrics.num_preemptions,
                "ellm.offloads": outcome.metrics.num_offloads,
            }
        return found

    def _span(
        self,
        name: str,
        begin_s: float,
        parent: Span | None,
        attributes: dict[str, Any],
        end_s: float | None = None,
    ) -> Span:
        """A span, ended if `end_s` is given."""
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        # Never below whatever span the event loop happens to be in.
        context = Context() if parent is None else set_span_in_context(parent, Context())
        span = self._tracer.start_span(
            name, context, attributes=attributes, start_time=self._ns(begin_s)
        )
        if end_s is not None:
            span.end(self._ns(max(begin_s, end_s)))
        return span

    def _ns(self, monotonic_s: float) -> int:
        return round(1e9 * (self._offset_s + monotonic_s))


@contextlib.contextmanager
def tracing_to(endpoint: str, engine: Engine) -> Iterator[CallTracer]:
    """Sends spans to a collector at `endpoint`, OTLP over gRPC, as long as the with-block lasts.

    Raises:
        ValueError: the packages are missing.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError(
            f"trace_to={endpoint!r} needs packages that are not here ({error}); "
            "pip install 'ellm-jax[trace]'"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "ellm"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))
    tracer = CallTracer(provider, engine.events)
    engine.watch_steps(tracer.on_step)
    try:
        yield tracer
    finally:
        engine.watch_steps(None)
        provider.shutdown()
