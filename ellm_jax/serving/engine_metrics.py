"""What a monitoring system is told of the engine: its memory, its queues and what it has done.

Nothing is counted here. Each scrape reads the engine's own figures once, so an engine that nobody
scrapes does no work for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ellm_jax.loop_stats import Load, LoopStats
from ellm_jax.memory.report import MemoryReport

_UNSIGNED_MOVES = ("inflate", "deflate", "offload", "fetch", "evict", "preempt", "trim")
_ALL_MOVES = (*_UNSIGNED_MOVES, "resize", "sleep", "wake")
_PHASES = ("plan", "map", "dispatch", "wait", "settle", "compile")


class Watched(Protocol):
    """What is read of an engine."""

    def memory(self) -> MemoryReport:
        """Bytes by owner and tier."""

    def stats(self) -> LoopStats:
        """Counts and times."""

    def load(self) -> Load:
        """How many requests are where."""

    @property
    def asleep(self) -> bool:
        """Whether its weights are gone, and requests wait."""


class EngineCollector(Collector):
    """Reads an engine at every scrape."""

    def __init__(self, engine: Watched):
        """`engine` is not changed."""
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry need not ask the engine at start which names there will be."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The families, with what the engine says now."""
        yield from _memory(self._engine.memory())
        stats = self._engine.stats()
        yield from _moves(stats)
        yield _queues(self._engine.load())
        yield from _work(stats)
        yield GaugeMetricFamily(
            "ellm_asleep",
            "1 while the weights are gone and requests wait.",
            value=self._engine.asleep,
        )


def _memory(report: MemoryReport) -> Iterator[Metric]:
    used = GaugeMetricFamily(
        "ellm_memory_bytes",
        "Memory by tier and owner; the owners of a tier add up to its limit.",
        labels=("tier", "owner"),
    )
    for owner, count_bytes in report.by_owner().items():
        used.add_metric(("device", owner), count_bytes)
    limit = GaugeMetricFamily(
        "ellm_memory_limit_bytes", "What the engine may take of a tier.", labels=("tier",)
    )
    limit.add_metric(("device",), report.limit_bytes)
    if report.host_limit_bytes:
        used.add_metric(("host", "kv"), report.host_used_bytes)
        used.add_metric(("host", "free"), report.host_limit_bytes - report.host_used_bytes)
        limit.add_metric(("host",), report.host_limit_bytes)
    yield used
    yield limit
    peaks = GaugeMetricFamily(
        "ellm_memory_peak_bytes", "The most that an owner has had.", labels=("owner",)
    )
    for owner, count_bytes in report.peaks.items():
        peaks.add_metric((owner,), count_bytes)
    yield peaks
    yield GaugeMetricFamily(
        "ellm_memory_physical_bytes",
        "Device memory that is taken from the system.",
        value=report.physical_bytes,
    )
    yield GaugeMetricFamily(
        "ellm_memory_available_bytes",
        "Part of the free bytes that is still mapped in slots of ended requests.",
        value=report.available_bytes,
    )
    yield GaugeMetricFamily(
        "ellm_memory_backed_bytes",
        "Part of the free bytes that is not mapped, its physical memory kept.",
        value=report.backed_bytes,
    )


def _moves(stats: LoopStats) -> Iterator[Metric]:
    yield _by_label("ellm_memory_moves", "Moves of memory.", "kind", _pick(stats.moves, _ALL_MOVES))
    # A resize may go either way, which no counter can; the limit says where it went.
    yield _by_label(
        "ellm_memory_moved_bytes",
        "Bytes that moves of memory moved.",
        "kind",
        _pick(stats.moved_bytes, _UNSIGNED_MOVES),
    )


def _queues(load: Load) -> Metric:
    family = GaugeMetricFamily(
        "ellm_engine_requests", "Completions in the engine, by queue.", labels=("queue",)
    )
    for queue, count in dataclasses.asdict(load).items():
        family.add_metric((queue,), count)
    return family


def _work(stats: LoopStats) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "ellm_prompt_tokens", "Prompt tokens of requests that began.", value=stats.prompt_tokens
    )
    yield CounterMetricFamily(
        "ellm_cached_prompt_tokens",
        "Prompt tokens that were found in the prefix cache.",
        value=stats.cached_tokens,
    )
    yield CounterMetricFamily(
        "ellm_output_tokens", "Tokens that requests were given.", value=stats.output_tokens
    )
    yield CounterMetricFamily("ellm_prefix_lookups", "Completions that began.", value=stats.started)
    yield CounterMetricFamily(
        "ellm_prefix_hits",
        "Completions that began with a part of the prompt found.",
        value=stats.prefix_hits,
    )
    yield CounterMetricFamily("ellm_steps", "Steps of the model.", value=stats.steps)
    yield _by_label(
        "ellm_step_seconds",
        "Where the engine's time went.",
        "phase",
        {phase: getattr(stats, f"{phase}_s") for phase in _PHASES},
    )
    yield CounterMetricFamily(
        "ellm_compiled_steps",
        "Step shapes compiled since the start, in the background or waited for.",
        value=stats.compiled_steps,
    )


def _by_label(name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _pick(values: Mapping[str, int], keys: tuple[str, ...]) -> dict[str, int]:
    """All keys are there from the start: a rate needs a first zero."""
    return {key: values.get(key, 0) for key in keys}
