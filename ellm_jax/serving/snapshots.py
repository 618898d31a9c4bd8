"""The last minutes, as people look at them: a snapshot a second in a ring that forgets."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

import msgspec

from ellm_jax.loop_stats import LoopStats
from ellm_jax.serving.engine_metrics import Watched
from ellm_jax.serving.latencies import Latencies

INTERVAL_S = 1.0
"""Seconds between two snapshots."""
KEPT = 600
"""Snapshots kept: ten minutes of them."""

_LATENCIES_OVER_S = 30.0

_log = logging.getLogger(__name__)


class Moves(msgspec.Struct, frozen=True):
    """Moves of memory of one kind since the snapshot before.

    Attributes:
        count: how many.
        bytes: how much they moved; of a resize, the change of the limit.
    """

    count: int
    bytes: int


class Percentiles(msgspec.Struct, frozen=True):
    """Of the calls of the last half minute, in milliseconds."""

    p50: float
    p95: float


class Snapshot(msgspec.Struct, frozen=True):
    """What the server looked like at one time.

    Attributes:
        number: counts up from 1; a gap means that some were forgotten.
        time_s: seconds since 1970.
        limit_bytes: of the device tier.
        device: bytes by owner; they add up to the limit.
        available_bytes, backed_bytes, physical_bytes: see `MemoryReport`.
        host_limit_bytes, host_used_bytes: of the host tier; 0 without one.
        running, waiting, offloaded, moving: completions in the engine's queues.
        queued: completions that wait for a seat in the engine.
        prompt_tokens_per_s, output_tokens_per_s: since the snapshot before; found prompt tokens
            count too.
        cached_fraction: of the prompt tokens since the snapshot before, the part that was found;
            None: there were none.
        moves: by kind; only those that happened.
        ttft_ms, tpot_ms: None: no call in the last half minute.
        asleep: whether the weights are gone.
    """

    number: int
    time_s: float
    limit_bytes: int
    device: dict[str, int]
    available_bytes: int
    backed_bytes: int
    physical_bytes: int
    host_limit_bytes: int
    host_used_bytes: int
    running: int
    waiting: int
    offloaded: int
    moving: int
    queued: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    cached_fraction: float | None
    moves: dict[str, Moves]
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    asleep: bool


class Sampler:
    """Takes snapshots and keeps the last of them. Used on one thread.

    Attributes:
        interval_s: seconds between two.
        ring: oldest first; never more than its `maxlen`.
    """

    def __init__(
        self,
        source: Watched,
        latencies: Latencies,
        *,
        queued: Callable[[], int] = lambda: 0,
        interval_s: float = INTERVAL_S,
        kept: int = KEPT,
        wall_clock: Callable[[], float] = time.time,
    ):
        """Args:
        source: the engine.
        latencies: of the calls.
        queued: how many completions wait outside the engine.
        interval_s: seconds between two snapshots.
        kept: most snapshots kept.
        wall_clock: seconds since 1970.
        """
        self.interval_s = interval_s
        self.ring: deque[Snapshot] = deque(maxlen=kept)
        self._source = source
        self._latencies = latencies
        self._queued = queued
        self._clock = wall_clock
        self._number = 0
        self._before = source.stats()
        self._before_s = wall_clock()

    async def run(self) -> None:
        """Takes a snapshot every `interval_s`, until it is cancelled."""
        while True:
            try:
                self.take()
            except Exception:
                _log.exception("no snapshot could be taken")
            await asyncio.sleep(self.interval_s)

    def since(self, number: int, most: int | None = None) -> list[Snapshot]:
        """Snapshots with a higher number, oldest first; only the last `most` of them."""
        newer = [snapshot for snapshot in self.ring if snapshot.number > number]
        return newer if most is None else newer[max(0, len(newer) - most) :]

    def take(self) -> Snapshot:
        """Takes one now."""
        report, stats, load = self._source.memory(), self._source.stats(), self._source.load()
        now = self._clock()
        seconds = max(1e-3, now - self._before_s)
        prompt = _grown(stats.prompt_tokens, self._before.prompt_tokens)
        cached = _grown(stats.cached_tokens, self._before.cached_tokens)
        output = _grown(stats.output_tokens, self._before.output_tokens)
        self._number += 1
        snapshot = Snapshot(
            number=self._number,
            time_s=now,
            limit_bytes=report.limit_bytes,
            device=report.by_owner(),
            available_bytes=report.available_bytes,
            backed_bytes=report.backed_bytes,
            physical_bytes=report.physical_bytes,
            host_limit_bytes=report.host_limit_bytes,
            host_used_bytes=report.host_used_bytes,
            running=load.running,
            waiting=load.waiting,
            offloaded=load.offloaded,
            moving=load.moving,
            queued=self._queued(),
            prompt_tokens_per_s=prompt / seconds,
            output_tokens_per_s=output / seconds,
            cached_fraction=cached / prompt if prompt else None,
            moves=_new_moves(stats, self._before),
            ttft_ms=_percentiles(self._latencies.ttft_ms(_LATENCIES_OVER_S)),
            tpot_ms=_percentiles(self._latencies.tpot_ms(_LATENCIES_OVER_S)),
            asleep=self._source.asleep,
        )
        self._before, self._before_s = stats, now
        self.ring.append(snapshot)
        return snapshot


def _new_moves(stats: LoopStats, before: LoopStats) -> dict[str, Moves]:
    moves = {}
    for kind, count in stats.moves.items():
        new = _grown(count, before.moves.get(kind, 0))
        if new:
            earlier = before.moved_bytes.get(kind, 0) if count > new else 0
            moves[kind] = Moves(new, stats.moved_bytes.get(kind, 0) - earlier)
    return moves


def _grown(now: int, before: int) -> int:
    """By how much a counter grew; what it says, if it was set back to 0 meanwhile."""
    return now - before if now >= before else now


def _percentiles(values: tuple[float, float] | None) -> Percentiles | None:
    return None if values is None else Percentiles(*values)
