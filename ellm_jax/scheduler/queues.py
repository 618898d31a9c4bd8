"""Where every request is: the queues between which it moves until it is over."""

from __future__ import annotations

import bisect
import itertools

from ellm_jax.request import Request, Status


class Queues:
    """Every request that is not over, in one of four queues.

    Attributes:
        running: those with a slot that steps are planned for, by admission, oldest first.
        waiting: those with nothing, by rank.
        offloaded: those in host memory only, by rank.
        moving: those with a slot, on their way to host memory or back.
    """

    def __init__(self, state_rows: int) -> None:
        """`state_rows`: most requests with penalties, bias or min_tokens that have a slot."""
        self._state_rows = state_rows
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.offloaded: list[Request] = []
        self.moving: list[Request] = []
        self._numbers = itertools.count()

    @property
    def busy(self) -> bool:
        """Whether a request is anywhere."""
        return bool(self.running or self.waiting or self.offloaded or self.moving)

    def add(self, request: Request) -> None:
        """Queues a request by its rank."""
        if request.number < 0:
            request.number = next(self._numbers)
        bisect.insort(self.waiting, request, key=lambda r: r.rank)

    def remove(self, request: Request) -> None:
        """Takes a request out of its queue; its slot is the caller's to release."""
        queue = self._queue_of(request)
        if request in queue:
            queue.remove(request)

    def _queue_of(self, request: Request) -> list[Request]:
        if request.status is Status.RUNNING:
            return self.running
        if request.status is Status.WAITING:
            return self.waiting
        return self.offloaded if request.status is Status.OFFLOADED else self.moving

    def move(self, request: Request, status: Status) -> None:
        """Puts a request into another queue."""
        self.remove(request)
        request.status = status
        if status is Status.WAITING:
            self.add(request)
        elif status is Status.OFFLOADED:
            bisect.insort(self.offloaded, request, key=lambda r: r.rank)
        elif status is not Status.FINISHED:
            self._queue_of(request).append(request)

    def requeue(self, request: Request) -> None:
        """Puts a request that lost its slot, and has nothing in host memory, back to wait."""
        self.remove(request)
        request.restart()
        self.add(request)

    def has_state_row(self, request: Request) -> bool:
        """Whether a request that needs a row of sampler state would get one."""
        if not request.params.needs_state:
            return True
        taken = sum(r.params.needs_state for r in (*self.running, *self.moving))
        return taken < self._state_rows
