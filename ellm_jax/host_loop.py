"""The host loop: plan a step while the one before runs, reserve its memory, dispatch, settle.

Single-threaded and free of text: requests go in, their tokens come out. One step is in flight
while the next is planned; tokens sampled by it stay on the device and feed the next one. So the
host learns one step late that a request has ended, and what belongs to a request is given back
only when no step in flight names it.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from ellm_jax._native import OutOfMemory
from ellm_jax.loop_stats import LoopStats
from ellm_jax.memory.ledger import Lease, Ledger
from ellm_jax.outputs import FinishReason
from ellm_jax.request import Request, Status
from ellm_jax.runtime.batch import Span
from ellm_jax.runtime.compiler import CompileFailed, StepCompiler
from ellm_jax.runtime.runner import Runner, StepFailed
from ellm_jax.runtime.sampler import state_row
from ellm_jax.runtime.shapes import StepKey
from ellm_jax.runtime.step import StepResult
from ellm_jax.scheduler.batching import MemoryPressure, Plan, Scheduler
from ellm_jax.step_io import (
    prompt_targets,
    sampling_inputs,
    take_prompt_logprobs,
    token_logprobs,
)

# How often a request is tried again after a step with it failed, or after the system refused the
# memory for it, before it is given up.
_MAX_FAILURES = 3
# Plans tried before the loop looks after its callers again.
_MAX_PLANS = 16


@dataclass(eq=False)
class _InFlight:
    plan: Plan
    result: StepResult
    lease: Lease
    key: StepKey


@dataclass(eq=False)
class HostLoop:
    """Moves requests through steps.

    Attributes:
        runner, compiler, ledger, scheduler: the parts it drives.
        on_token: called with a request after each new token; returns a reason to stop
            ("stop" and what stopped it), or None. Text belongs there.
        on_finish: called once when a request is over, its memory given back or about to be.
        clock: seconds, monotonic.
    """

    runner: Runner
    compiler: StepCompiler
    ledger: Ledger
    scheduler: Scheduler
    on_token: Callable[[Request], str | int | None]
    on_finish: Callable[[Request], None]
    clock: Callable[[], float] = time.monotonic
    stats: LoopStats = field(default_factory=LoopStats)
    _in_flight: deque[_InFlight] = field(default_factory=deque)
    _steps_of: dict[Request, int] = field(default_factory=dict)
    _leaving: set[Request] = field(default_factory=set)
    _state_rows: list[int] = field(default_factory=list)
    _refusals: int = 0
    _crowded: bool = False

    def __post_init__(self) -> None:
        self._state_rows = list(range(1, self.runner.state_rows))

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or a step is in flight."""
        scheduler = self.scheduler
        return bool(scheduler.running or scheduler.waiting or self._in_flight)

    def submit(self, request: Request) -> None:
        """Queues a request."""
        self.scheduler.add(request)

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """Ends a request now; tokens in flight for it are dropped."""
        if request.status is not Status.FINISHED:
            self._finish(request, reason)

    def step(self) -> None:
        """Starts the next step, if there is something to compute, and settles the one before."""
        launched = self._launch()
        if launched is not None:
            self._in_flight.append(launched)
        if self._in_flight and (launched is None or len(self._in_flight) > 1):
            self._settle(self._in_flight.popleft())

    def drain(self) -> None:
        """Waits for the steps in flight and settles them."""
        while self._in_flight:
            self._settle(self._in_flight.popleft())

    def shut_down(self) -> None:
        """Gives everything back, whatever state the loop is in; not to be used afterwards."""
        for step in self._in_flight:
            with contextlib.suppress(StepFailed):
                self.runner.wait(step.result)
            self.ledger.finish(step.lease)
        self._in_flight.clear()
        self.compiler.close()
        self.ledger.close()

    # Planning and launching.

    def _launch(self) -> _InFlight | None:
        """Plans, reserves and dispatches; None when there is nothing to compute right now, or when
        relieving the pressure takes longer than the callers should wait to be heard."""
        self.compiler.collect()
        for _ in range(_MAX_PLANS):
            try:
                plan = self._plan()
                if plan is None:
                    return None
                key = self.compiler.choose(plan.rows, len(plan.shares), plan.mode)
                need_bytes = self.compiler.ensure(key)
                self.compiler.refine(plan.rows, len(plan.shares), plan.mode)
                with self._timed("map_s"):
                    lease = self._reserve(plan, need_bytes)
            except CompileFailed as error:
                # Only a mode that a request asked for is compiled so late.
                self._end_all(error)
            except (MemoryPressure, RuntimeError) as cause:
                self._relieve(cause)
            else:
                self._refusals = 0
                return self._dispatch(plan, key, lease)
        return None

    def _plan(self) -> Plan | None:
        """The scheduler's plan. Nobody is admitted between a preemption and the next settled step:
        the room that was made is for those that go on."""
        compiling_s = self.compiler.waited_s
        with self._timed("plan_s"):
            exact = self._refusals > 0
            plan = self.scheduler.plan(admit=not self._crowded, exact=exact)
            if plan is None and self._crowded and not self._in_flight:
                self._crowded = False
                plan = self.scheduler.plan(exact=exact)
        compiling_s = self.compiler.waited_s - compiling_s
        self.stats.plan_s -= compiling_s
        self.stats.compile_s += compiling_s
        return plan

    def _reserve(self, plan: Plan, need_bytes: int) -> Lease:
        """The step's activations and every chunk it writes to, together or not at all."""
        slots = [_slot(share.request) for share in plan.shares]
        return self.ledger.reserve(need_bytes, slots, [s.begin + s.count for s in plan.shares])

    def _relieve(self, cause: Exception) -> None:
        """Makes room after a plan that does not fit, by the mildest means that is left: the end of
        the step in flight, unmapping what slots hold in excess, smaller buckets or trying again,
        preempting the last admitted, and in the end giving up the one that runs alone."""
        if self._in_flight:
            self.drain()
            return
        with self._timed("map_s"):
            if self.scheduler.trim_running():
                return
        victim = self.scheduler.victim()
        short = isinstance(cause, MemoryPressure | OutOfMemory)
        if victim is not None and (short or self._refusals >= _MAX_FAILURES):
            self._preempt(victim)
            return
        self._refusals += 1
        if self._refusals > _MAX_FAILURES:
            self._end_all(cause)

    def _end_all(self, cause: Exception) -> None:
        """Gives up every request that runs, after nothing else has helped."""
        self._refusals = 0
        self.drain()
        for request in list(self.scheduler.running):
            request.error = str(cause)
            self._finish(request, "error")

    def _preempt(self, request: Request) -> None:
        """Takes a request's slot; it is prefilled again, output included, when memory allows."""
        self._give_back(request)
        self.scheduler.requeue(request)
        self._crowded = True
        request.num_preemptions += 1
        self.stats.preemptions += 1

    def _give_state_rows(self, plan: Plan) -> None:
        """Gives newly admitted requests with penalties, bias or min_tokens their row."""
        for share in plan.shares:
            request = share.request
            if request.state_row or not request.params.needs_state:
                continue
            request.state_row = self._state_rows.pop()
            words, bias = state_row(
                request.prompt_ids,
                request.output_ids,
                request.params,
                list(request.stop_ids),
                self.runner.config.vocab_size,
            )
            self.runner.set_state_row(request.state_row, words, bias)

    def _dispatch(self, plan: Plan, key: StepKey, lease: Lease) -> _InFlight:
        with self._timed("plan_s"):
            self._give_state_rows(plan)
            now = self.clock()
            spans = []
            for share in plan.shares:
                request = share.request
                if request.first_scheduled_s is None:
                    request.first_scheduled_s = now
                end = share.begin + share.count
                tokens = request.tokens(share.begin, end)
                spans.append(Span(_slot(request), share.begin, tokens, share.samples))
            sampling = sampling_inputs(plan.shares, key.shape.seqs)
            targets = prompt_targets(plan.shares) if key.mode.prompt_logprobs else None
        with self._timed("dispatch_s"):
            result = self.runner.dispatch(key, spans, sampling, targets)
        for share in plan.shares:
            request = share.request
            request.computed += share.count
            request.in_flight += share.samples
            self._steps_of[request] = self._steps_of.get(request, 0) + 1
        self.stats.peak_running = max(self.stats.peak_running, len(self.scheduler.running))
        return _InFlight(plan, result, lease, key)

    # Settling.

    def _settle(self, step: _InFlight) -> None:
        """Takes the tokens of the oldest step, after waiting for them."""
        try:
            with self._timed("wait_s"):
                result = self.runner.wait(step.result)
        except StepFailed as failure:
            self._fail(step, failure)
            return
        with self._timed("settle_s"):
            self.ledger.finish(step.lease)
            self.stats.steps += 1
            self._crowded = False
            now = self.clock()
            row = sample = 0
            for share in step.plan.shares:
                request = share.request
                self._steps_of[request] -= 1
                request.num_failures = 0
                if request.status is not Status.FINISHED:
                    if result.prompt_logprobs is not None:
                        take_prompt_logprobs(share, result.prompt_logprobs, row)
                    if share.samples:
                        request.in_flight -= 1
                        self._take_token(request, result, sample, now)
                row += share.count
                sample += share.samples
            self._release_leaving()

    def _take_token(self, request: Request, result: StepResult, sample: int, now: float) -> None:
        token = int(result.tokens[sample])
        if token < 0:
            request.error = "the model's scores are not finite; are its weights damaged?"
            self._finish(request, "error")
            return
        if request.first_token_s is None:
            request.first_token_s = now
        request.output_ids.append(token)
        if request.params.logprobs is not None and result.logprobs is not None:
            count = request.params.logprobs
            request.logprobs.append(token_logprobs(token, result.logprobs, sample, count))
        if token in request.stop_ids and len(request.output_ids) > request.params.min_tokens:
            if token in (request.params.stop_token_ids or ()):
                request.stop_reason = token
            self.on_token(request)
            self._finish(request, "stop")
            return
        stopped_by = self.on_token(request)
        if stopped_by is not None:
            request.stop_reason = stopped_by
            self._finish(request, "stop")
        elif len(request.output_ids) >= request.max_tokens:
            self._finish(request, "length")

    def _fail(self, step: _InFlight, failure: StepFailed) -> None:
        """After a failed step: its requests start again, and those that keep failing end. What was
        dispatched behind it read what it did not write, so that is void too."""
        steps = [step, *self._in_flight]
        for later in self._in_flight:
            with contextlib.suppress(StepFailed):
                self.runner.wait(later.result)
        self._in_flight.clear()
        for void in steps:
            self.ledger.finish(void.lease)
            for share in void.plan.shares:
                self._steps_of[share.request] -= 1
                share.request.in_flight -= share.samples
        suspects = [s.request for s in step.plan.shares if s.request.suspect]
        blamed = suspects or [share.request for share in step.plan.shares]
        for request in {share.request: None for void in steps for share in void.plan.shares}:
            if request.status is not Status.RUNNING:
                continue
            request.num_failures += request in blamed
            if request.num_failures >= _MAX_FAILURES:
                request.error = f"{_MAX_FAILURES} steps with it failed, the last so: {failure}"
                self._finish(request, "error")
            else:
                self._give_back(request)
                self.scheduler.requeue(request)
        # Whoever else holds a row of sampler state has to write it anew.
        for request in self.scheduler.running:
            self._give_back_state_row(request)
        self._release_leaving()

    # Endings.

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.remove(request)
        request.finish_reason = reason
        request.finished_s = self.clock()
        self._give_back_state_row(request)
        self._leaving.add(request)
        self.on_finish(request)
        # Last: whoever sees it over from another thread sees all of it.
        request.status = Status.FINISHED
        self._release_leaving()

    def _release_leaving(self) -> None:
        """Gives back what ended requests held, once no step in flight names them."""
        for request in [r for r in self._leaving if not self._steps_of.get(r)]:
            self._leaving.remove(request)
            self._give_back(request)

    def _give_back(self, request: Request) -> None:
        self._steps_of.pop(request, None)
        self._give_back_state_row(request)
        if request.slot is not None:
            slot, request.slot = request.slot, None
            self.ledger.release(slot)

    def _give_back_state_row(self, request: Request) -> None:
        # At once, even while a step in flight counts in it: whoever gets the row writes it anew,
        # and the device does that after the step.
        if request.state_row:
            self._state_rows.append(request.state_row)
            request.state_row = 0

    def _timed(self, field_name: str) -> AbstractContextManager[None]:
        return self.stats.timed(field_name)


def _slot(request: Request) -> int:
    assert request.slot is not None
    return request.slot
