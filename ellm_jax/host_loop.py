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
from dataclasses import dataclass, field

from ellm_jax._native import OutOfMemory
from ellm_jax.execution import DispatchedStep, Executor, Outcome, Steps
from ellm_jax.lifecycle import Lifecycle
from ellm_jax.loop_stats import LoopStats
from ellm_jax.memory.host_tier import HostTier
from ellm_jax.memory.ledger import Lease, Ledger
from ellm_jax.outputs import FinishReason
from ellm_jax.overlap import Overlap
from ellm_jax.pressure import Pressure
from ellm_jax.recovery import Recovery
from ellm_jax.request import Request, Status
from ellm_jax.runtime.failures import CompileFailed, StepFailed
from ellm_jax.runtime.shapes import StepKey
from ellm_jax.scheduler.batching import Scheduler
from ellm_jax.scheduler.plan import MemoryPressure, Plan
from ellm_jax.scheduler.slo import SloBuffer
from ellm_jax.step_results import take_prompt_logprobs, token_logprobs
from ellm_jax.structured.matcher import GrammarError, Matcher

# Plans tried before the loop looks after its callers again.
_MAX_PLANS = 16
# Tokens ahead for which chunks are mapped before the step that writes them is planned.
_PREMAPPED_TOKENS = 2
# How often it is made sure that the ledger adds up. If not, the engine ends, with the figures.
_STEPS_PER_CHECK = 1024
# The cost model learns from every step that takes at least so long, and from every eighth.
_LEARNED_S = 2e-3


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
        overlap: what the host's work beside the steps takes.
        lifecycle: ends requests and gives back what they hold.
        tiering: moves requests between the tiers; None without a host tier.
        on_step: called with each step that is over, and when; None: nobody asks.
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
    on_step: Callable[[DispatchedStep, float], None] | None = None
    overlap: Overlap = field(default_factory=Overlap)
    _in_flight: deque[DispatchedStep] = field(default_factory=deque)
    _settled_s: float = 0.0
    _waited_s: float = 0.0

    def __post_init__(self) -> None:
        ledger, scheduler = self.ledger, self.scheduler
        lifecycle = self.lifecycle = Lifecycle(
            self.executor, ledger, scheduler, self.host, self.on_finish, self.clock
        )
        self.tiering = lifecycle.tiering
        self._recovery = Recovery(
            self.executor, ledger, scheduler, lifecycle, self._in_flight, self.drain
        )
        self._pressure = Pressure(
            ledger, scheduler, lifecycle, self._recovery, self.stats, self.drain
        )

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or a step is in flight."""
        return self.scheduler.busy or bool(self._in_flight)

    def submit(self, request: Request) -> None:
        """Queues a request."""
        self.scheduler.add(request)

    def refuse(self, request: Request, error: str) -> None:
        """Ends a request that was never queued, and says why."""
        self.lifecycle.give_up([request], error)

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """Ends a request now; tokens in flight for it are dropped."""
        if request.status is not Status.FINISHED:
            self.lifecycle.finish(request, reason)

    def step(self) -> bool:
        """Starts the next step, if there is something to compute, and settles the one before.
        False when nothing can go on until something changes: asleep, or every request needs more
        than the limit."""
        if self.asleep:
            return False
        begin_s = self.clock() - self._waited_s - self.compiler.waited_s
        goes_on = self._advance()
        if goes_on:
            end_s = self.clock() - self._waited_s - self.compiler.waited_s
            self.overlap.note_host(end_s - begin_s)
        return goes_on

    def _advance(self) -> bool:
        settled = self._settle_early()
        launched = self._launch()
        if launched is not None:
            self._in_flight.append(launched)
        if self._in_flight and (launched is None or len(self._in_flight) > 1):
            self._settle(self._in_flight.popleft())
            return True
        if launched is None and self.tiering is not None and self.tiering.wait():
            return True
        return settled or launched is not None or self.ledger.repair()

    def drain(self) -> bool:
        """Waits for the steps in flight and settles them; False if there are none."""
        if not self._in_flight:
            return False
        while self._in_flight:
            self._settle(self._in_flight.popleft())
        return True

    def make_room(self, victim: Request, cause: str) -> None:
        """Takes a request's memory; it goes on when memory allows. No step may be in flight."""
        self._pressure.make_room(victim, cause)

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

    def _launch(self) -> DispatchedStep | None:
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
                with self.stats.timed("map_s"):
                    lease = self._reserve(plan, need_bytes)
            except CompileFailed as error:
                self._recovery.compile_failed(error)
            except (MemoryPressure, RuntimeError) as cause:
                self._pressure.relieve(cause)
            else:
                self._pressure.refusals = 0
                try:
                    return self._dispatch(plan, key, lease)
                except StepFailed as failure:
                    self._recovery.dispatch_failed(plan, lease, failure)
        return None

    def _move_tiers(self) -> None:
        """Takes in copies that are done, starts others, and makes way for prompts that are late."""
        if self.tiering is None:
            return
        with self.stats.timed("plan_s"):
            now = self.clock()
            if not self._in_flight and not self.scheduler.running:
                self._pressure.crowded = False
            with contextlib.suppress(CompileFailed, OutOfMemory):  # the plan will tell
                self.tiering.advance(now, fetch=not self._pressure.crowded)
            leaver = self.scheduler.tiers.may_make_way(now)
            if leaver is not None:
                self.tiering.park(leaver)

    def _plan(self) -> Plan | None:
        """The scheduler's plan. Nobody is admitted between a preemption and the next settled step:
        the room that was made is for those that go on."""
        pressure = self._pressure
        compiling_s = self.compiler.waited_s
        with self.stats.timed("plan_s"):
            exact = pressure.refusals > 0
            now = self.clock()
            plan = self.scheduler.plan(now, admit=not pressure.crowded, exact=exact)
            if plan is None and pressure.crowded and not self._in_flight:
                pressure.crowded = False
                plan = self.scheduler.plan(now, exact=exact)
        compiling_s = self.compiler.waited_s - compiling_s
        self.stats.plan_s -= compiling_s
        self.stats.compile_s += compiling_s
        return plan

    def _reserve(self, plan: Plan, need_bytes: int) -> Lease:
        """The step's activations and every chunk it writes to, together or not at all."""
        slots = [_slot(share.request) for share in plan.shares]
        return self.ledger.reserve(need_bytes, slots, [s.begin + s.count for s in plan.shares])

    def _dispatch(self, plan: Plan, key: StepKey, lease: Lease) -> DispatchedStep:
        now = self.clock()
        with self.stats.timed("dispatch_s"):
            handle = self.executor.dispatch(plan, key)
        with self.stats.timed("plan_s"):
            steps_of = self.lifecycle.steps_of
            ahead: list[Request] = []
            taken = self.ledger.taken_tokens
            for share in plan.shares:
                request = share.request
                if request.first_scheduled_s is None:
                    request.first_scheduled_s = now
                    self.stats.started += 1
                    self.stats.prefix_hits += request.cached_tokens > 0
                    self.stats.prompt_tokens += len(request.prompt_ids)
                    self.stats.cached_tokens += request.cached_tokens
                request.computed += share.count
                steps_of[request] = steps_of.get(request, 0) + 1
                if share.samples:
                    request.in_flight += 1
                    if request.computed + _PREMAPPED_TOKENS > taken(_slot(request)):
                        ahead.append(request)
                    if request.to_host and not request.parked:
                        assert self.tiering is not None
                        self.tiering.park(request)
            self.stats.peak_running = max(self.stats.peak_running, len(self.scheduler.running))
        if ahead:
            with self.stats.timed("map_s"):
                self._premap(ahead)
        return DispatchedStep(plan, handle, lease, now)

    def _premap(self, requests: Sequence[Request]) -> None:
        """Maps the chunk that each of these will write soon, off this thread."""
        tokens = [min(r.computed + _PREMAPPED_TOKENS, r.max_total_tokens) for r in requests]
        self.ledger.premap([_slot(r) for r in requests], tokens)

    # Settling.

    def _settle_early(self) -> bool:
        """Settles the step in flight before the next one is planned, where requests wait for its
        tokens to be part of that, and the others lose little or nothing by it. Otherwise those
        requests are part of every other step."""
        if not self._in_flight or not self._in_flight[-1].plan.mode.masked:
            return False
        if self.overlap.pays and not self.executor.ready(self._in_flight[-1].handle):
            return False
        return self.drain()

    def _settle(self, step: DispatchedStep) -> None:
        """Takes the tokens of the oldest step, after waiting for them."""
        try:
            begin_s = self.clock()
            with self.stats.timed("wait_s"):
                result = self.executor.wait(step.handle)
            self._waited_s += self.clock() - begin_s
        except StepFailed as failure:
            self._recovery.step_failed(step, failure)
            return
        with self.stats.timed("settle_s"):
            now = self.clock()
            self._learn(step, now)
            if self.on_step is not None:
                self.on_step(step, now)
            self.ledger.finish(step.lease)
            self.stats.steps += 1
            self._pressure.crowded = False
            tile = self.ledger.tile_tokens
            steps_of = self.lifecycle.steps_of
            late = [False, False]
            row = sample = 0
            for share in step.plan.shares:
                request = share.request
                steps_of[request] -= 1
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
            self.lifecycle.release_leaving()
            if self.tiering is not None:
                self.tiering.leave_parked()
            self._judge(now, late)
            if self.stats.steps % _STEPS_PER_CHECK == 0:
                self.ledger.check()

    def _after_tiles(self, request: Request) -> None:
        """Full tiles are there: they may be shared, and copied ahead."""
        self.scheduler.sharing.bring_in(request)
        if request.to_host and self.tiering is not None:
            self.tiering.copy_ahead(request)

    def _learn(self, step: DispatchedStep, now: float) -> None:
        """Takes the time of a step in: from its start, or the end of the one before it."""
        seconds = now - max(step.begin_s, self._settled_s)
        self._settled_s = now
        self.overlap.note_step(seconds)
        work = step.plan.work
        decoding = sum(1 for share in step.plan.shares if share.count == 1 and share.samples)
        if decoding:
            self.stats.decode_s += seconds
            self.stats.decode_tokens += decoding
            self.scheduler.pace.note_step(seconds)
        if seconds > _LEARNED_S or self.stats.steps % 8 == 0:
            self.scheduler.cost.observe(work, seconds)

    def _judge(self, now: float, late: Sequence[bool]) -> None:
        """Tells the host tier's logical size how this iteration kept the targets."""
        if self.slo is None:
            return
        # Who still waits, or is kept in host memory, past its time counts too.
        overdue, kept_late = self.scheduler.tiers.late(now)
        self.slo.observe(late[0] or overdue, late[1] or kept_late)

    def _take_token(
        self, request: Request, result: Outcome, sample: int, now: float, late: list[bool]
    ) -> None:
        token = result.tokens[sample]
        if token < 0:
            error = "the model's scores are not finite; are its weights damaged?"
            self.lifecycle.give_up([request], error)
            return
        if request.first_token_s is None:
            request.first_token_s = now
            if request.ttft_ms is not None:
                late[0] |= 1e3 * (now - request.arrival_s) > request.ttft_ms
        elif request.tpot_ms is not None:
            late[1] |= self.scheduler.pace.due_s(request) < now
        request.output_ids.append(token)
        self.stats.output_tokens += 1
        if request.params.logprobs is not None and result.logprobs is not None:
            count = request.params.logprobs
            request.logprobs.append(token_logprobs(token, result.logprobs, sample, count))
        if token in request.stop_ids and len(request.output_ids) > request.params.min_tokens:
            if token in (request.params.stop_token_ids or ()):
                request.stop_reason = token
            self.on_token(request)
            self.lifecycle.finish(request, "stop")
            return
        stopped_by = self.on_token(request)
        if stopped_by is not None:
            request.stop_reason = stopped_by
            self.lifecycle.finish(request, "stop")
        elif request.matcher is not None and self._follow(request, request.matcher, token):
            return
        elif len(request.output_ids) >= request.max_tokens:
            self.lifecycle.finish(request, "length")

    def _follow(self, request: Request, matcher: Matcher, token: int) -> bool:
        """Goes on in a request's grammar; True if that ends it."""
        try:
            matcher.take(token)
        except GrammarError as error:
            self.lifecycle.give_up([request], f"structured output: {error}")
            return True
        if matcher.complete:
            self.lifecycle.finish(request, "stop")
        return matcher.complete


def _slot(request: Request) -> int:
    assert request.slot is not None
    return request.slot
