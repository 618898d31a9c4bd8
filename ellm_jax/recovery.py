"""What becomes of requests after something failed: a step, its dispatch, its compilation, or the
system's taking memory back.

Nothing that failed is believed: requests start again, and those that keep failing end, with the
reason. A device may still be at work on a part of a step that has failed, so it is waited for
before anything is given up. Of the requests of a failed step the scheduler puts at most one into
each later step, so that the one to blame is found.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable

from ellm_jax.execution import DispatchedStep, Executor
from ellm_jax.lifecycle import Lifecycle
from ellm_jax.memory.ledger import Lease, Ledger
from ellm_jax.request import Request, Status
from ellm_jax.runtime.failures import CompileFailed, StepFailed
from ellm_jax.scheduler.batching import Scheduler
from ellm_jax.scheduler.plan import Plan

# How often a request is tried again after a step with it failed, before it is given up.
_MAX_FAILURES = 3


class Recovery:
    """Brings the loop back to a state that is known after a failure."""

    def __init__(
        self,
        executor: Executor,
        ledger: Ledger,
        scheduler: Scheduler,
        lifecycle: Lifecycle,
        in_flight: deque[DispatchedStep],
        drain: Callable[[], bool],
    ):
        """Args:
        executor: runs the steps.
        ledger: device memory.
        scheduler: whose queues the requests are in.
        lifecycle: ends requests and has them start again.
        in_flight: the steps in flight, oldest first.
        drain: settles them.
        """
        self._executor = executor
        self._ledger = ledger
        self._scheduler = scheduler
        self._lifecycle = lifecycle
        self._in_flight = in_flight
        self._drain = drain

    def step_failed(self, step: DispatchedStep, failure: StepFailed) -> None:
        """After a failed step: its requests start again, and those that keep failing end. What was
        dispatched behind it read what it did not write, so that is void too."""
        steps = [step, *self._in_flight]
        for later in self._in_flight:
            with contextlib.suppress(StepFailed):
                self._executor.wait(later.handle)
        self._in_flight.clear()
        self._ledger.quiesce()
        steps_of = self._lifecycle.steps_of
        for void in steps:
            self._ledger.finish(void.lease)
            for share in void.plan.shares:
                steps_of[share.request] -= 1
                share.request.in_flight -= share.samples
        suspects = [s.request for s in step.plan.shares if s.request.suspect]
        blamed = suspects or [share.request for share in step.plan.shares]
        for request in {share.request: None for void in steps for share in void.plan.shares}:
            if request.status is not Status.RUNNING:
                continue
            if not (request in blamed and self._is_given_up(request, failure)):
                self._lifecycle.restart(request)
        self._forget_sampler_state()
        self._lifecycle.release_leaving()

    def dispatch_failed(self, plan: Plan, lease: Lease, failure: StepFailed) -> None:
        """After a step that did not start, or not to its end: it is planned again, and requests
        that keep failing end."""
        self._ledger.quiesce()
        self._ledger.finish(lease)
        self._drain()
        for share in plan.shares:
            if share.request.status is Status.RUNNING:
                self._is_given_up(share.request, failure)
        self._forget_sampler_state()

    def compile_failed(self, cause: CompileFailed) -> None:
        """Gives up the requests that ask for what cannot be compiled; all that run where it is
        nothing particular."""
        self._drain()
        running = self._scheduler.running
        asking = [r for r in running if cause.mode.logprobs and r.params.logprobs is not None]
        asking += [
            r
            for r in running
            if cause.mode.prompt_logprobs and r.params.prompt_logprobs is not None
        ]
        asking += [r for r in running if cause.mode.masked and r.matcher is not None]
        self._lifecycle.give_up(asking or running, str(cause))

    def restart_broken(self) -> bool:
        """Has requests start again whose slots broke when the system refused to unmap; False if
        there are none. No step may be in flight."""
        ledger = self._ledger
        broken = [
            r for r in self._scheduler.running if r.slot is not None and ledger.is_broken(r.slot)
        ]
        for request in broken:
            self._lifecycle.restart(request)
        return bool(broken)

    def _is_given_up(self, request: Request, failure: StepFailed) -> bool:
        """Counts a failure of a request, and ends it if that was one too many."""
        request.num_failures += 1
        if request.num_failures < _MAX_FAILURES:
            return False
        error = f"{_MAX_FAILURES} steps with it failed, the last so: {failure}"
        self._lifecycle.give_up([request], error)
        return True

    def _forget_sampler_state(self) -> None:
        """Whoever still holds a row of sampler state has to write it anew."""
        for request in self._scheduler.running:
            self._executor.give_back(request)
