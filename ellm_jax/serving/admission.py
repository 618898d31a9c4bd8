"""Who gets a seat in the engine, who waits for one, and who is sent away."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from ellm_jax.intake import Group
from ellm_jax.serving.call import Call
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.fair_queue import FairQueue
from ellm_jax.serving.stream import RequestStream

_EXPECTED_TOKENS = 256
"""What an answer is counted as before it is known: what was asked for, but at most this."""

_FINISHES = 128
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0


class Admission:
    """Keeps the engine supplied, and the rest in a fair queue.

    The engine gets more completions than run at once, so that its scheduler can choose, but not
    all: what it has cannot be put into another order. A completion takes a seat.
    """

    def __init__(self, seats: int, max_queue: int, clock: Callable[[], float] = time.monotonic):
        """Args:
        seats: completions that the engine is given at a time.
        max_queue: completions that may wait beside them.
        clock: seconds, monotonic.
        """
        self._seats = seats
        self._max_queue = max_queue
        self._clock = clock
        self._taken = 0
        self._queue: FairQueue[RequestStream] = FairQueue()
        self._charged: dict[Group, tuple[str, float]] = {}
        self._finishes: deque[float] = deque(maxlen=_FINISHES)

    @property
    def queued(self) -> int:
        """Completions that wait here."""
        return self._queue.seats

    def waiting(self) -> Mapping[str, int]:
        """Completions that wait here, by tenant."""
        return self._queue.waiting()

    def check(self, call: Call) -> None:
        """Raises ServiceError (OVERLOADED) if the call could not even wait."""
        if self._fits(call):
            return
        if self._queue.newest_of_largest(call.tenant.name, call.params.n) is None:
            raise self.overloaded(call)

    def admit(self, stream: RequestStream) -> RequestStream | None:
        """Queues a stream; in a full queue, in the place of the returned one, whose tenant has the
        most waiting.

        Raises:
            ServiceError: OVERLOADED: there is no place.
        """
        call, displaced = stream.call, None
        if not self._fits(call):
            displaced = self._queue.newest_of_largest(call.tenant.name, call.params.n)
            if displaced is None:
                raise self.overloaded(call)
            self.drop(displaced)
        expected = min(stream.group.requests[0].max_tokens, _EXPECTED_TOKENS)
        cost = len(stream.prompt_token_ids) + call.params.n * expected
        self._charged[stream.group] = (call.tenant.name, cost)
        self._queue.push(call.tenant.name, stream, call.priority, cost, call.params.n)
        return displaced

    def next(self) -> RequestStream | None:
        """The next stream to give to the engine, now seated; None if there is none, or no seat."""
        seats = self._queue.peek_seats()
        if seats is None or (self._taken and self._taken + seats > self._seats):
            return None
        self._taken += seats
        return self._queue.pop()

    def drop(self, stream: RequestStream) -> bool:
        """Takes a stream that waits out of the queue; False if it is seated or gone."""
        waited = self._queue.remove(stream)
        if waited:
            del self._charged[stream.group]
        return waited

    def release(self, group: Group) -> None:
        """A seated group is over: its seats are free, and its tenant pays what it really took."""
        tenant, charged = self._charged.pop(group)
        self._taken -= len(group.requests)
        tokens = sum(len(request.output_ids) for request in group.requests)
        self._queue.charge(tenant, len(group.requests[0].prompt_ids) + tokens - charged)
        self._finishes.extend([self._clock()] * len(group.requests))

    def overloaded(self, call: Call) -> ServiceError:
        """The refusal of a call for which there is no place."""
        return ServiceError(
            ErrorKind.OVERLOADED,
            f"{self._queue.seats} completions wait already, and the queue takes "
            f"{self._max_queue}; try again later",
            param="n" if call.params.n > self._max_queue else None,
            retry_after_s=self._retry_after_s(call.params.n),
        )

    def _fits(self, call: Call) -> bool:
        seats = call.params.n
        direct = not len(self._queue) and (not self._taken or self._taken + seats <= self._seats)
        return direct or self._queue.seats + seats <= self._max_queue

    def _retry_after_s(self, seats: int) -> float:
        """When so many places may have come free, at the pace of the latest finishes."""
        if len(self._finishes) < 2:
            return _MIN_RETRY_S
        span_s = self._clock() - self._finishes[0]
        seconds = seats * span_s / len(self._finishes)
        return min(max(seconds, _MIN_RETRY_S), _MAX_RETRY_S)
