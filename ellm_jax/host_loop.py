"""The host loop: plan a step while the one before runs, reserve its memory, dispatch, settle.

Single-threaded, free of text and of JAX: requests go in, their tokens come out. One step is in
flight while the next is planned; tokens sampled by it stay on the device and feed the next one. So
the host learns one step late that a request has ended, and what belongs to a request is given back
only when no step in flight names it.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ellm_jax._native import OutOfMemory
from ellm_jax.execution import Executor, Outcome, Steps
from ellm_jax.loop_stats import LoopStats
from ellm_jax.memory.host_tier import HostTier
from ellm_jax.memory.ledger import Lease, Ledger
from ellm_jax.outputs import FinishReason
from ellm_jax.request import Request, Status
from ellm_jax.runtime.failures import CompileFailed, StepFailed
from ellm_jax.runtime.shapes import StepKey
from ellm_jax.scheduler.batching import Scheduler
from ellm_jax.scheduler.plan import MemoryPressure, Plan
from ellm_jax.scheduler.slo import SloBuffer
from ellm_jax.step_results import take_prompt_logprobs, token_logprobs
from ellm_jax.tiering import Tiering

# How often a request is tried again after a step with it failed, or after the system refused the
# memory for it, before it is given up.
_MAX_FAILURES = 3
# Plans tried before the loop looks after its callers again.
_MAX_PLANS = 16


# Tokens ahead for which chunks are mapped before the step that writes them is planned.
_PREMAPPED_TOKENS = 2
# How often it is made sure that the ledger adds up. If not, the engine ends, with the figures.
_STEPS_PER_CHECK = 1024
# The cost model learns from every step that takes at least so long, and from every eighth.
_LEARNED_S = 2e-3


@dataclass(eq=False)
class _InFlight:
    plan: Plan
    handle: Any
    lease: Lease
    key: StepKey
    begin_s: float


@dataclass(eq=False)
class HostLoop:
    """Moves requests through steps.

    Attributes:
        executor, compiler, ledger, scheduler: the parts it drives.
        on_token: called with a request after each new token; returns a reason to stop
            ("stop" and what stopped it), or None. Text belongs there.
        on_finish: called once when a request is over, its memory given back or about to be.
        host: the host tier; None for none.
        slo: its logical size.
        clock: seconds, monotonic.
        asleep: whether the weights are gone; requests wait.
        absent_bytes: bytes of the weights while they are gone.
        tiering: moves requests between the tiers; None without a host tier.
    """

    executor: Executor
    compiler: Steps
    ledger: Ledger
    scheduler: Scheduler
    on_token: Callable[[Request], str | int | None]
    on_finish: Callable[[Request], None]
    host: HostTier | None = None
    slo: SloBuffer | None = None
    clock: Callable[[], float] = time.monotonic
    stats: LoopStats = field(default_factory=LoopStats)
    asleep: bool = False
    absent_bytes: int = 0
    _in_flight: deque[_InFlight] = field(default_factory=deque)
    _steps_of: dict[Request, int] = field(default_factory=dict)
    _leaving: set[Request] = field(default_factory=set)
    _parked: set[Request] = field(default_factory=set)
    _refusals: int = 0
    _crowded: bool = False
    _settled_s: float = 0.0

    def __post_init__(self) -> None:
        self.tiering: Tiering | None = None
        if self.host is not None:
            self.tiering = Tiering(
                self.scheduler, self.ledger, self.host, self._give_back, self._restart
            )

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or a step is in flight."""
        return self.scheduler.busy or bool(self._in_flight)

    def submit(self, request: Request) -> None:
        """Queues a request."""
        self.scheduler.add(request)

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """Ends a request now; tokens in flight for it are dropped."""
        if request.status is not Status.FINISHED:
            self._finish(request, reason)

    def step(self) -> bool:
        """Starts the next step, if there is something to compute, and settles the one before.
        False when nothing can go on until something changes: asleep, or every request needs more
        than the limit."""
        if self.asleep:
            return False
        launched = self._launch()
        if launched is not None:
            self._in_flight.append(launched)
        if self._in_flight and (launched is None or len(self._in_flight) > 1):
            self._settle(self._in_flight.popleft())
            return True
        if launched is None and self.tiering is not None and self.tiering.wait():
            return True
        return launched is not None or self.ledger.repair()

    def drain(self) -> None:
        """Waits for the steps in flight and settles them."""
        while self._in_flight:
            self._settle(self._in_flight.popleft())

    def shut_down(self) -> None:
        """Gives everything back, whatever state the loop is in; not to be used afterwards."""
        for step in self._in_flight:
            with contextlib.suppress(StepFailed):
                self.executor.wait(step.handle)
            self.ledger.finish(step.lease)
        self._in_flight.clear()
        self.compiler.close()
        if self.host is not None:
            self.host.close()
        self.ledger.close()

    # Planning and launching.

    def _launch(self) -> _InFlight | None:
        """Plans, reserves and dispatches; None when there is nothing to compute right now, or when
        relieving the pressure takes longer than the callers should wait to be heard."""
        self.compiler.collect()
        self._move_tiers()
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
                self._end_asking(error)
            except (MemoryPressure, RuntimeError) as cause:
                self._relieve(cause)
            else:
                self._refusals = 0
                try:
                    return self._dispatch(plan, key, lease)
                except StepFailed as failure:
                    self._fail_dispatch(plan, lease, failure)
        return None

    def _move_tiers(self) -> None:
        """Takes in copies that are done, starts others, and makes way for prompts that are late."""
        if self.tiering is None:
            return
        with self._timed("plan_s"):
            now = self.clock()
            if not self._in_flight and not self.scheduler.running:
                self._crowded = False
            with contextlib.suppress(CompileFailed):  # the plan will tell
                self.tiering.advance(now, fetch=not self._crowded)
            leaver = self.scheduler.may_make_way(now)
            if leaver is not None:
                self._park(leaver)

    def _plan(self) -> Plan | None:
        """The scheduler's plan. Nobody is admitted between a preemption and the next settled step:
        the room that was made is for those that go on."""
        compiling_s = self.compiler.waited_s
        with self._timed("plan_s"):
            exact = self._refusals > 0
            now = self.clock()
            plan = self.scheduler.plan(now, admit=not self._crowded, exact=exact)
            if plan is None and self._crowded and not self._in_flight:
                self._crowded = False
                plan = self.scheduler.plan(now, exact=exact)
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
        the step in flight, of a copy on its way, unmapping what slots hold in excess, smaller
        buckets or trying again, moving the last in rank to host memory or having it computed
        again, and in the end giving up the one that runs alone."""
        if self._in_flight:
            self.drain()
            return
        if self.tiering is not None and self.tiering.wait():
            return
        with self._timed("map_s"):
            if self.scheduler.trim_running() or self.ledger.repair():
                return
        broken = [r for r in self.scheduler.running if self.ledger.is_broken(_slot(r))]
        for request in broken:
            self._restart(request)
        if broken:
            return
        victim = self.scheduler.victim()
        short = isinstance(cause, MemoryPressure | OutOfMemory)
        if victim is not None and (short or self._refusals >= _MAX_FAILURES):
            self.make_room(victim, "KV of those that run")
            return
        self._refusals += 1
        if self._refusals > _MAX_FAILURES:
            self._end_all(cause)

    def _end_all(self, cause: Exception) -> None:
        """Gives up every request that runs, after nothing else has helped."""
        self._refusals = 0
        self.drain()
        self._end(self.scheduler.running, cause)

    def _end_asking(self, cause: CompileFailed) -> None:
        """Gives up the requests that ask for what cannot be compiled; all that run where it is
        nothing particular."""
        self.drain()
        running = self.scheduler.running
        asking = [r for r in running if cause.mode.logprobs and r.params.logprobs is not None]
        asking += [
            r
            for r in running
            if cause.mode.prompt_logprobs and r.params.prompt_logprobs is not None
        ]
        self._end(asking or running, cause)

    def _end(self, requests: Sequence[Request], cause: Exception) -> None:
        for request in dict.fromkeys(requests):
            request.error = str(cause)
            self._finish(request, "error")

    def make_room(self, victim: Request, cause: str) -> None:
        """Takes a request's memory: to host memory where that is quicker, or else it is prefilled
        again, output included, when memory allows. No step may be in flight."""
        self._crowded = True
        self._parked.discard(victim)
        if (
            self.tiering is not None
            and self.scheduler.prefers_offload(victim)
            and self.tiering.leave(victim)
        ):
            return
        begin = self.ledger.events.clock()
        slot = victim.slot
        taken = 0 if slot is None else self.ledger.taken_bytes(slot)
        self._restart(victim)
        victim.num_preemptions += 1
        self.stats.preemptions += 1
        self.ledger.events.add("preempt", taken, cause, begin, victim.id)

    def _restart(self, request: Request) -> None:
        """Has a request computed again from the start; its memory is given back. No step in flight
        may name it."""
        if self.tiering is not None:
            self.tiering.drop(request)  # first: a copy on its way reads the slot
        self._parked.discard(request)
        self._give_back(request)
        self.scheduler.requeue(request)

    def _park(self, request: Request) -> None:
        """Has a request leave for host memory as soon as no step in flight names it."""
        request.parked = True
        self._parked.add(request)
        self._leave_parked()

    def _leave_parked(self) -> None:
        if self.tiering is None:
            return
        for request in [r for r in self._parked if not self._steps_of.get(r)]:
            self._parked.discard(request)
            if request.status is not Status.RUNNING:
                continue
            if self.scheduler.waiting or self.scheduler.offloaded:
                self.tiering.leave(request)
            else:
                request.parked = request.to_host = False  # nobody needs its room any more

    def _dispatch(self, plan: Plan, key: StepKey, lease: Lease) -> _InFlight:
        now = self.clock()
        with self._timed("dispatch_s"):
            handle = self.executor.dispatch(plan, key)
        with self._timed("plan_s"):
            steps_of = self._steps_of
            ahead: list[Request] = []
            taken = self.ledger.taken_tokens
            for share in plan.shares:
                request = share.request
                if request.first_scheduled_s is None:
                    request.first_scheduled_s = now
                    self.stats.prompt_tokens += len(request.prompt_ids)
                    self.stats.cached_tokens += request.cached_tokens
                request.computed += share.count
                steps_of[request] = steps_of.get(request, 0) + 1
                if share.samples:
                    request.in_flight += 1
                    if request.computed + _PREMAPPED_TOKENS > taken(_slot(request)):
                        ahead.append(request)
                    if request.to_host and request.first_token_s is None:
                        self._park(request)
            self.stats.peak_running = max(self.stats.peak_running, len(self.scheduler.running))
        if ahead:
            with self._timed("map_s"):
                self._premap(ahead)
        return _InFlight(plan, handle, lease, key, now)

    def _premap(self, requests: Sequence[Request]) -> None:
        """Maps the chunk that each of these will write soon, off this thread."""
        tokens = [min(r.computed + _PREMAPPED_TOKENS, r.max_total_tokens) for r in requests]
        self.ledger.premap([_slot(r) for r in requests], tokens)

    # Settling.

    def _settle(self, step: _InFlight) -> None:
        """Takes the tokens of the oldest step, after waiting for them."""
        try:
            with self._timed("wait_s"):
                result = self.executor.wait(step.handle)
        except StepFailed as failure:
            self._fail(step, failure)
            return
        with self._timed("settle_s"):
            now = self.clock()
            self._learn(step, now)
            self.ledger.finish(step.lease)
            self.stats.steps += 1
            self._crowded = False
            tile = self.ledger.tile_tokens
            late = [False, False]
            row = sample = 0
            for share in step.plan.shares:
                request = share.request
                self._steps_of[request] -= 1
                request.num_failures = 0
                if request.status is not Status.FINISHED:
                    end = request.settled = share.begin + share.count
                    if result.prompt_logprobs is not None:
                        take_prompt_logprobs(share, result.prompt_logprobs, row)
                    if share.count > 1 or end % tile == 0:
                        self._after_tiles(request)
                    if share.samples:
                        request.in_flight -= 1
                        self._take_token(request, result, sample, now, late)
                row += share.count
                sample += share.samples
            self._release_leaving()
            self._leave_parked()
            self._judge(now, late)
            if self.stats.steps % _STEPS_PER_CHECK == 0:
                self.ledger.check()

    def _after_tiles(self, request: Request) -> None:
        """Full tiles are there: they may be shared, and copied ahead."""
        self.scheduler.sharing.bring_in(request)
        if request.to_host and self.tiering is not None:
            self.tiering.copy_ahead(request)

    def _learn(self, step: _InFlight, now: float) -> None:
        """Takes the time of a step in: from its start, or the end of the one before it."""
        seconds = now - max(step.begin_s, self._settled_s)
        self._settled_s = now
        work = step.plan.work
        decoding = sum(1 for share in step.plan.shares if share.count == 1 and share.samples)
        if decoding:
            self.stats.decode_s += seconds
            self.stats.decode_tokens += decoding
            self.scheduler.note_pace(seconds)
        if seconds > _LEARNED_S or self.stats.steps % 8 == 0:
            self.scheduler.cost.observe(work, seconds)

    def _judge(self, now: float, late: Sequence[bool]) -> None:
        """Tells the host tier's logical size how this iteration kept the targets."""
        if self.slo is None:
            return
        head = self.scheduler.head()
        overdue = (
            head is not None
            and head.ttft_ms is not None
            and head.first_token_s is None
            and 1e3 * (now - head.arrival_s) > head.ttft_ms
        )
        # Whoever is kept in host memory past its time counts too, not only once it is back.
        kept = self.scheduler.first_due()
        kept_late = kept is not None and self.scheduler.due_s(kept) < now
        self.slo.observe(late[0] or overdue, late[1] or kept_late)

    def _take_token(
        self, request: Request, result: Outcome, sample: int, now: float, late: list[bool]
    ) -> None:
        token = result.tokens[sample]
        if token < 0:
            request.error = "the model's scores are not finite; are its weights damaged?"
            self._finish(request, "error")
            return
        if request.first_token_s is None:
            request.first_token_s = now
            if request.ttft_ms is not None:
                late[0] |= 1e3 * (now - request.arrival_s) > request.ttft_ms
        elif request.tpot_ms is not None:
            late[1] |= self.scheduler.due_s(request) < now
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
                self.executor.wait(later.handle)
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
                self._restart(request)
        # Whoever else holds a row of sampler state has to write it anew.
        for request in self.scheduler.running:
            self.executor.give_back(request)
        self._release_leaving()

    def _fail_dispatch(self, plan: Plan, lease: Lease, failure: StepFailed) -> None:
        """After a step that did not even start: it is planned again, and requests that keep failing
        end."""
        self.ledger.finish(lease)
        self.drain()
        for share in plan.shares:
            request = share.request
            if request.status is not Status.RUNNING:
                continue
            request.num_failures += 1
            if request.num_failures >= _MAX_FAILURES:
                request.error = f"{_MAX_FAILURES} steps with it failed, the last so: {failure}"
                self._finish(request, "error")
        for request in self.scheduler.running:
            self.executor.give_back(request)

    # Endings.

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.remove(request)
        self._parked.discard(request)
        if self.tiering is not None:
            self.tiering.drop(request)
        if reason in ("stop", "length"):
            self.scheduler.note_length(request)
        request.finish_reason = reason
        request.finished_s = self.clock()
        self.executor.give_back(request)
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
        self.executor.give_back(request)
        if request.slot is not None:
            slot, request.slot = request.slot, None
            self.ledger.release(slot)
            self.scheduler.sharing.let_go(request)

    def _timed(self, field_name: str) -> AbstractContextManager[None]:
        return self.stats.timed(field_name)


def _slot(request: Request) -> int:
    assert request.slot is not None
    return request.slot
