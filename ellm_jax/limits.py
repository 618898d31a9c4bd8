"""Limits that change while requests run, and an engine that sleeps."""

from __future__ import annotations

from ellm_jax._native import OutOfMemory
from ellm_jax.host_loop import HostLoop


class Limits:
    """Changes what a loop may take. Called on its thread, between two steps."""

    def __init__(self, loop: HostLoop):
        """Takes the loop."""
        self._loop = loop

    def resize(self, limit_bytes: int) -> None:
        """Sets the device's limit. Requests that no longer fit beside each other go to host memory
        or are computed again later; none ends for it.

        Raises:
            OutOfMemory: weights and fixed owners alone do not fit; the old limit stays.
            RuntimeError: the system refused to take memory back; likewise.
        """
        begin = self._loop.ledger.events.clock()
        before = self._loop.ledger.usage()["limit"]
        self._loop.drain()
        while True:
            try:
                self._loop.ledger.resize(limit_bytes)
                break
            except OutOfMemory:
                if self._loop.tiering is not None and self._loop.tiering.wait():
                    continue
                running = self._loop.scheduler.running
                if not running:
                    raise
                self._loop.make_room(max(running, key=lambda r: r.rank), "a lower limit")
        for request in list(self._loop.scheduler.running):
            if not self._loop.scheduler.could_run(request):
                self._loop.make_room(request, "a lower limit")
        self._loop.ledger.events.add("resize", limit_bytes - before, "asked for", begin)

    def resize_host(self, limit_bytes: int) -> None:
        """Sets the limit of host memory; what no longer fits there is computed again.

        Raises:
            ValueError: the policy keeps no KV in host memory.
        """
        if self._loop.tiering is None or self._loop.slo is None:
            raise ValueError(
                "the policy has no host tier; make the engine with policy='elastic' or 'inter'"
            )
        self._loop.tiering.resize(limit_bytes)
        self._loop.slo.resize(limit_bytes)

    def sleep(self) -> None:
        """Gives nearly everything back: KV to host memory as far as that has room, cached prefixes,
        weights. Requests wait for `wake`."""
        if self._loop.asleep:
            return
        begin = self._loop.ledger.events.clock()
        before = self._loop.ledger.usage()["physical"]
        self._loop.drain()
        for request in list(self._loop.scheduler.running):
            self._loop.make_room(request, "sleep")
        if self._loop.tiering is not None:
            self._loop.tiering.wait_all()
            assert self._loop.host is not None
            self._loop.host.trim()
        self._loop.ledger.drop_prefixes()
        self._loop.absent_bytes = self._loop.executor.sleep()
        self._loop.ledger.give_weights(self._loop.absent_bytes)
        self._loop.ledger.trim()
        self._loop.asleep = True
        given = before - self._loop.ledger.usage()["physical"]
        self._loop.ledger.events.add("sleep", given, "asked for", begin)

    def wake(self) -> None:
        """Takes the weights again; requests go on.

        Raises:
            OutOfMemory: the limit was lowered meanwhile and does not hold them; still asleep.
        """
        if not self._loop.asleep:
            return
        begin = self._loop.ledger.events.clock()
        self._loop.ledger.take_weights(self._loop.absent_bytes)
        try:
            self._loop.executor.wake()
        except BaseException:
            self._loop.ledger.give_weights(self._loop.absent_bytes)
            raise
        self._loop.asleep = False
        taken, self._loop.absent_bytes = self._loop.absent_bytes, 0
        self._loop.ledger.events.add("wake", taken, "asked for", begin)
