"""How requests end and begin again, and when they give back what they hold.

A step in flight may still read and write the memory of a request that the host has already heard
the end of. So what belongs to a request is given back only when no step in flight names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ellm_jax.execution import Executor
from ellm_jax.memory.host_tier import HostTier
from ellm_jax.memory.ledger import Ledger
from ellm_jax.outputs import FinishReason
from ellm_jax.request import Request, Status
from ellm_jax.scheduler.batching import Scheduler
from ellm_jax.tiering import Tiering


class Lifecycle:
    """Ends requests, has them start again, and gives back their slots and blocks.

    Attributes:
        tiering: moves requests between the tiers; None without a host tier.
        steps_of: how many steps in flight name a request; counted by whoever dispatches and
            settles them.
        leaving: requests that are over, their memory not yet given back; in order.
    """

    def __init__(
        self,
        executor: Executor,
        ledger: Ledger,
        scheduler: Scheduler,
        host: HostTier | None,
        on_finish: Callable[[Request], None],
        clock: Callable[[], float],
    ):
        """Args:
        executor: holds sampler state.
        ledger: device memory.
        scheduler: whose queues the requests are in.
        host: host memory; None for none.
        on_finish: called once when a request is over, its memory given back or about to be.
        clock: seconds, monotonic.
        """
        self._executor = executor
        self._ledger = ledger
        self._scheduler = scheduler
        self._on_finish = on_finish
        self._clock = clock
        self.steps_of: dict[Request, int] = {}
        self.leaving: dict[Request, None] = {}
        self.tiering: Tiering | None = None
        if host is not None:
            self.tiering = Tiering(
                scheduler, ledger, host, self.give_back, self.restart, self.steps_of
            )

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request now; tokens in flight for it are dropped."""
        self._scheduler.remove(request)
        if self.tiering is not None:
            self.tiering.drop(request)
        if reason in ("stop", "length"):
            self._scheduler.pace.note_answer(request)
        request.finish_reason = reason
        request.finished_s = self._clock()
        request.matcher = None  # of no more use, and it may be large
        self._executor.give_back(request)
        self.leaving[request] = None
        self._on_finish(request)
        # Last: whoever sees it over from another thread sees all of it.
        request.status = Status.FINISHED
        self.release_leaving()

    def give_up(self, requests: Sequence[Request], error: str) -> None:
        """Ends requests that cannot go on, each once, and says why."""
        for request in dict.fromkeys(requests):
            request.error = error
            self.finish(request, "error")

    def restart(self, request: Request) -> None:
        """Has a request computed again from the start; its memory is given back. No step in flight
        may name it."""
        if self.tiering is not None:
            self.tiering.drop(request)  # first: a copy on its way reads the slot
        self.give_back(request)
        self._scheduler.requeue(request)

    def release_leaving(self) -> None:
        """Gives back what ended requests held, once no step in flight names them."""
        for request in [r for r in self.leaving if not self.steps_of.get(r)]:
            del self.leaving[request]
            self.give_back(request)

    def give_back(self, request: Request) -> None:
        """Gives back a request's slot and sampler state. No step in flight may name it."""
        self.steps_of.pop(request, None)
        self._executor.give_back(request)
        if request.slot is not None:
            slot, request.slot = request.slot, None
            self._ledger.release(slot)
            self._scheduler.sharing.let_go(request)
