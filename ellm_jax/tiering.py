"""Requests on their way between the device and host memory (eLLM section 4.3).

A request leaves when no step in flight names it: what its copy lacks is copied on the copier's
thread, and its slot is released when that is done. One that was admitted for that purpose is
copied piece by piece while its prompt is still being prefilled, so that little is left at the end.
It comes back the other way round: slot and chunks first, then the copy, then the next plan takes
it in. Steps of other requests run meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from ellm_jax._native import OutOfMemory
from ellm_jax.memory.host_tier import CopyFailed, HostCopy, HostTier
from ellm_jax.memory.ledger import Ledger
from ellm_jax.request import Request, Status
from ellm_jax.scheduler.batching import Scheduler

_log = logging.getLogger(__name__)


class Tiering:
    """Moves requests between the tiers. Used by the host loop's thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        ledger: Ledger,
        host: HostTier,
        give_back_slot: Callable[[Request], None],
        restart: Callable[[Request], None],
        steps_of: Mapping[Request, int],
    ):
        """Args:
        scheduler: whose queues the requests are in.
        ledger: device memory.
        host: host memory.
        give_back_slot: releases a request's slot.
        restart: has a request computed again from the start, and releases its slot.
        steps_of: how many steps in flight name a request.
        """
        self._scheduler = scheduler
        self._ledger = ledger
        self.host = host
        self._give_back_slot = give_back_slot
        self._restart = restart
        self._steps_of = steps_of
        self._parked: dict[Request, None] = {}  # in the order of their wish
        self._clock = ledger.events.clock

    def advance(self, now: float, *, fetch: bool) -> None:
        """Takes in the copies that are done, and starts what should come back."""
        for request in list(self._scheduler.moving):
            if request.status is Status.LEAVING:
                self._poll_leaving(request)
            else:
                self._poll_fetching(request)
        while fetch:
            request_or_none = self._scheduler.tiers.next_fetch(now)
            if request_or_none is None or not self._start_fetch(request_or_none):
                return

    def copy_ahead(self, request: Request) -> None:
        """Starts copying the full tiles of a prompt that will leave after its first token."""
        tile = self._ledger.tile_tokens
        full = request.settled // tile * tile
        if request.slot is None or not full:
            return
        if request.host is None:
            request.host = HostCopy(request.id)
        if full > request.host.tokens:
            try:
                self.host.copy_out(request.host, request.slot, full)
            except RuntimeError as error:
                request.to_host = False  # it stays; pressure will tell
                self._note_refusal(request, error)

    def park(self, request: Request) -> None:
        """Has a request leave for host memory as soon as no step in flight names it."""
        request.parked = True
        self._parked[request] = None
        self.leave_parked()

    def leave_parked(self) -> None:
        """Sends those off who wait for it, and whom no step in flight names any more."""
        for request in [r for r in self._parked if not self._steps_of.get(r)]:
            self._parked.pop(request, None)
            if request.status is not Status.RUNNING:
                continue
            if self._scheduler.waiting or self._scheduler.offloaded:
                self.leave(request)
            else:
                request.parked = request.to_host = False  # nobody needs its room any more

    def leave(self, request: Request) -> bool:
        """Starts a request's way to host memory. No step in flight may name it. False if host
        memory is full, or the system refuses it; the request runs on then."""
        assert request.slot is not None
        request.to_host = False
        request.parked = False
        self._parked.pop(request, None)
        if request.host is None:
            request.host = HostCopy(request.id)
        try:
            self.host.copy_out(request.host, request.slot, request.computed)
        except RuntimeError as error:
            self._note_refusal(request, error)
            return False
        self.host.keep_only(request.host)
        request.num_offloads += 1
        request.left_s = self._clock()
        self._scheduler.move(request, Status.LEAVING)
        return True

    def _note_refusal(self, request: Request, error: RuntimeError) -> None:
        if not isinstance(error, OutOfMemory):
            _log.warning("request %s stays on the device: %s", request.id, error)
            request.copy_failed = True

    def _poll_leaving(self, request: Request) -> None:
        assert request.host is not None
        try:
            if not self.host.out_done(request.host):
                return
        except CopyFailed as error:
            self._note_refusal(request, error)
            request.host = None
            self._scheduler.move(request, Status.RUNNING)
            return
        self._give_back_slot(request)
        self._scheduler.move(request, Status.OFFLOADED)

    def _start_fetch(self, request: Request) -> bool:
        """Gives an offloaded request a slot with its chunks, and starts the copy."""
        copy, sharing = request.host, self._scheduler.sharing
        assert copy is not None
        computed = request.computed
        found = sharing.found(request)
        opened = sharing.open_slot(request, found)
        # Since it left, others may have computed more of its prompt than it had.
        request.computed = request.settled = max(computed, request.computed if opened else 0)
        if not opened:
            return False
        assert request.slot is not None
        try:
            self._ledger.extend(request.slot, request.num_tokens)
        except RuntimeError as error:
            if not isinstance(error, OutOfMemory):
                _log.warning("request %s stays in host memory: %s", request.id, error)
            self._give_back_slot(request)
            # What others have computed is not in its copy, and may be gone by the next time.
            request.computed = request.settled = computed
            return False
        self._scheduler.move(request, Status.FETCHING)
        self.host.copy_in(copy, request.slot, request.pinned)
        self._poll_fetching(request)
        return True

    def _poll_fetching(self, request: Request) -> None:
        assert request.host is not None
        try:
            if not self.host.in_done(request.host):
                return
        except CopyFailed as error:
            _log.warning("request %s is computed again: %s", request.id, error)
            request.host = None
            self._restart(request)
            return
        self._scheduler.move(request, Status.RUNNING)
        self._scheduler.sharing.bring_in(request)

    def wait(self) -> bool:
        """Waits for a copy on its way, and takes it in; False if there is none."""
        moving = self._scheduler.moving
        if not moving:
            return False
        self.host.wait_any([r.host for r in moving if r.host is not None])
        self.advance(0.0, fetch=False)
        return True

    def wait_all(self) -> None:
        """Waits for every copy on its way."""
        while self.wait():
            pass

    def drop(self, request: Request) -> None:
        """Gives up what a request has in host memory, and its wish to go there."""
        self._parked.pop(request, None)
        if request.host is not None:
            self.host.drop(request.host)
            request.host = None

    def resize(self, limit_bytes: int) -> None:
        """Sets the limit of host memory. Requests that no longer fit there are computed again, the
        last in rank first."""
        while True:
            try:
                self.host.resize(limit_bytes)
                return
            except OutOfMemory:
                if self.wait():
                    continue
                if not self._scheduler.offloaded:
                    raise
                last = self._scheduler.offloaded[-1]
                self.drop(last)
                self._restart(last)
