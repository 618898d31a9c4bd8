"""What the host loop does when the next step does not fit: it makes room, by the mildest means."""

from __future__ import annotations

from collections.abc import Callable

from ellm_jax._native import OutOfMemory
from ellm_jax.lifecycle import Lifecycle
from ellm_jax.loop_stats import LoopStats
from ellm_jax.memory.ledger import Ledger
from ellm_jax.recovery import Recovery
from ellm_jax.request import Request
from ellm_jax.scheduler.batching import Scheduler
from ellm_jax.scheduler.plan import MemoryPressure

# How often a plan is tried again after the system refused the memory for it, before somebody makes
# room, or is given up.
_MAX_REFUSALS = 3


class Pressure:
    """Makes room for the steps to come.

    Attributes:
        crowded: somebody made room lately: it is for those that go on, and nobody is admitted.
            Whoever settles a step ends this.
        refusals: how many plans failed, with nobody left to make room, since one could be
            reserved; above 0 plans count with the smallest buckets.
    """

    def __init__(
        self,
        ledger: Ledger,
        scheduler: Scheduler,
        lifecycle: Lifecycle,
        recovery: Recovery,
        stats: LoopStats,
        drain: Callable[[], bool],
    ):
        """Args:
        ledger: device memory.
        scheduler: whose queues the requests are in.
        lifecycle: ends requests and has them start again.
        recovery: looks after slots that broke.
        stats: where preemptions and the time for unmapping are counted.
        drain: settles the steps in flight; False if there are none.
        """
        self._ledger = ledger
        self._scheduler = scheduler
        self._lifecycle = lifecycle
        self._recovery = recovery
        self._stats = stats
        self._drain = drain
        self.crowded = False
        self.refusals = 0

    def relieve(self, cause: Exception) -> None:
        """Makes room after a plan that does not fit, by the mildest means that is left: the end of
        the step in flight, of a copy on its way, unmapping what slots hold in excess, smaller
        buckets or trying again, moving the last in rank to host memory or having it computed
        again, and in the end giving up the one that runs alone."""
        if self._drain():
            return
        tiering = self._lifecycle.tiering
        if tiering is not None and tiering.wait():
            return
        with self._stats.timed("map_s"):
            if self._scheduler.trim_running() or self._ledger.repair():
                return
        if self._recovery.restart_broken():
            return
        victim = self._scheduler.tiers.victim()
        short = isinstance(cause, MemoryPressure | OutOfMemory)
        if victim is not None and (short or self.refusals >= _MAX_REFUSALS):
            self.make_room(victim, "KV of those that run")
            return
        self.refusals += 1
        if self.refusals > _MAX_REFUSALS:
            self.refusals = 0
            self._lifecycle.give_up(self._scheduler.running, str(cause))

    def make_room(self, victim: Request, cause: str) -> None:
        """Takes a request's memory: to host memory where that is quicker, or else it is prefilled
        again, output included, when memory allows. No step may be in flight."""
        self.crowded = True
        tiering = self._lifecycle.tiering
        if (
            tiering is not None
            and self._scheduler.tiers.prefers_offload(victim)
            and tiering.leave(victim)
        ):
            return
        begin = self._ledger.events.clock()
        slot = victim.slot
        taken = 0 if slot is None else self._ledger.taken_bytes(slot)
        self._lifecycle.restart(victim)
        victim.num_preemptions += 1
        self._stats.preemptions += 1
        self._ledger.events.add("preempt", taken, cause, begin, victim.id)
