"""Metrics in Prometheus' text format: how calls went, and what the engine says of itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from ellm_jax import __version__
from ellm_jax.outputs import RequestMetrics, RequestOutput
from ellm_jax.serving.engine_metrics import EngineCollector, Watched
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.latencies import Latencies
from ellm_jax.serving.observers import OUTCOMES, outcome_of
from ellm_jax.serving.tenants import Tenant

if TYPE_CHECKING:
    from ellm_jax.serving.call import Call

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `Metrics.render` gives."""

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_E2E_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
_TARGETS = ("ttft", "tpot")
_MISSED = (ErrorKind.DEADLINE, ErrorKind.OVERLOADED, ErrorKind.INTERNAL)
"""A call that got nothing before it ended so has missed its targets."""
_TENANT_TOKENS = ("prompt", "cached_prompt", "output")


@dataclass
class _Open:
    """A call that is not over: when it was admitted, the first token, on the monotonic clock."""

    admitted_s: float
    prompt_tokens: int
    ttft_s: float | None = None


class Metrics:
    """Counts calls on the event loop, and reads the engine when it is asked.

    Times are those of the server: from the admission of a call, its time in the server's queue
    included, to when the event loop has the tokens.

    Attributes:
        registry: what everybody with a key may see; of this object alone.
        latencies: those of the last calls, for the dashboard.
    """

    def __init__(
        self,
        engine: Watched,
        *,
        model_name: str = "",
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Args:
        engine: what is read at every scrape.
        model_name: what clients call the model.
        ttft_ms, tpot_ms: targets of calls that bring none; None: they have none.
        clock: seconds, monotonic; the engine's.
        """
        self._clock = clock
        self._default_targets = {"ttft": ttft_ms, "tpot": tpot_ms}
        self._open: dict[Call, _Open] = {}
        self.latencies = Latencies(clock)
        self.registry = registry = CollectorRegistry(auto_describe=False)
        registry.register(EngineCollector(engine))
        ProcessCollector(registry=registry)
        Gauge(
            "ellm_info", "What runs here; always 1.", ("version", "model"), registry=registry
        ).labels(__version__, model_name).set(1)
        self._requests = Counter(
            "ellm_requests", "Calls that are over.", ("outcome",), registry=registry
        )
        self._refused = Counter(
            "ellm_requests_refused",
            "Calls that were refused before anything was done for them.",
            ("reason",),
            registry=registry,
        )
        Gauge("ellm_requests_open", "Calls admitted and not over.", registry=registry).set_function(
            lambda: len(self._open)
        )
        self._queue_s = self._histogram(
            "ellm_queue_seconds", "From admission to the first step.", _TTFT_S
        )
        self._ttft_s = self._histogram(
            "ellm_time_to_first_token_seconds", "From admission to the first token.", _TTFT_S
        )
        self._tpot_s = self._histogram(
            "ellm_time_per_output_token_seconds", "Mean of a call after its first token.", _TPOT_S
        )
        self._e2e_s = self._histogram(
            "ellm_request_seconds", "From admission to the end of complete answers.", _E2E_S
        )
        self._slo = Counter(
            "ellm_slo_requests",
            "Calls with a latency target, by whether it was kept.",
            ("target", "met"),
            registry=registry,
        )
        self._tenants = CollectorRegistry(auto_describe=False)
        self._tenant_requests = Counter(
            "ellm_tenant_requests",
            "Calls that are over, or were refused, by tenant.",
            ("tenant", "outcome"),
            registry=self._tenants,
        )
        self._tenant_tokens = Counter(
            "ellm_tenant_tokens",
            "Tokens of calls that are over, by tenant.",
            ("tenant", "kind"),
            registry=self._tenants,
        )
        self._start_at_zero()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def _start_at_zero(self) -> None:
        """Every series is there from the start: a rate needs a first value."""
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        for kind in ErrorKind:
            self._refused.labels(kind.value)
        for target in _TARGETS:
            for met in ("true", "false"):
                self._slo.labels(target, met)

    def render(self, *, admin: bool = False) -> bytes:
        """All families in the text format; those by tenant only for the admin."""
        text: bytes = generate_latest(self.registry)
        return text + generate_latest(self._tenants) if admin else text

    # As an `Observer`, on the event loop.

    def on_admitted(self, call: Call, prompt_tokens: int) -> None:
        """Its times count from here."""
        self._open[call] = _Open(self._clock(), prompt_tokens)

    def on_refused(self, error: ServiceError, tenant: Tenant) -> None:
        """Counts it."""
        self._refused.labels(error.kind.value).inc()
        self._tenant_requests.labels(tenant.name, f"refused_{error.kind.value}").inc()

    def on_first_token(self, call: Call, metrics: RequestMetrics) -> None:
        """Takes its TTFT."""
        entry = self._open.get(call)
        if entry is None:
            return
        entry.ttft_s = self._clock() - entry.admitted_s
        self._ttft_s.observe(entry.ttft_s)
        self.latencies.add_ttft(1e3 * entry.ttft_s)
        if metrics.first_scheduled_s is not None:
            self._queue_s.observe(max(0.0, metrics.first_scheduled_s - entry.admitted_s))
        self._judge("ttft", call.ttft_ms, 1e3 * entry.ttft_s)

    def on_finished(self, call: Call, outcome: RequestOutput | ServiceError) -> None:
        """Counts it, and takes its times if the answer is complete."""
        entry = self._open.pop(call, None)
        name = outcome_of(outcome)
        self._requests.labels(name).inc()
        self._tenant_requests.labels(call.tenant.name, name).inc()
        if entry is None:
            return
        tokens = {"prompt": entry.prompt_tokens}
        if isinstance(outcome, RequestOutput):
            tokens["output"] = sum(len(each.token_ids) for each in outcome.outputs)
            tokens["cached_prompt"] = outcome.metrics.cached_tokens
        if isinstance(outcome, ServiceError) and outcome.kind in _MISSED and entry.ttft_s is None:
            self._judge("ttft", call.ttft_ms, math.inf)
            self._judge("tpot", call.tpot_ms, math.inf)
        for kind in _TENANT_TOKENS:
            self._tenant_tokens.labels(call.tenant.name, kind).inc(tokens.get(kind, 0))
        if name not in ("stop", "length") or not isinstance(outcome, RequestOutput):
            return
        self._e2e_s.observe(self._clock() - entry.admitted_s)
        tpot_ms = outcome.metrics.tpot_ms
        if tpot_ms is not None:
            self._tpot_s.observe(1e-3 * tpot_ms)
            self.latencies.add_tpot(tpot_ms)
            self._judge("tpot", call.tpot_ms, tpot_ms)

    def _judge(self, target: str, own_ms: float | None, took_ms: float) -> None:
        target_ms = self._default_targets[target] if own_ms is None else own_ms
        if target_ms is not None:
            self._slo.labels(target, "true" if took_ms <= target_ms else "false").inc()
