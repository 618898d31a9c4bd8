"""Runs planned steps in fake time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ellm_jax.execution import Outcome
from ellm_jax.request import Request
from ellm_jax.runtime.failures import StepFailed
from ellm_jax.runtime.shapes import StepKey
from ellm_jax.scheduler.cost import CostModel, StepWork
from ellm_jax.scheduler.plan import Plan, Share
from ellm_jax.sim.clock import FakeClock
from ellm_jax.sim.contents import Contents, sampled_token


@dataclass(frozen=True)
class Faults:
    """What goes wrong with steps; nothing unless told so.

    Attributes:
        fails: whether a step with this plan fails.
        on_broken: told of a step that fails because the system took a slot from under it.
        spoils: whether the scores of a request are not finite now.
        slower: how many times longer than it should a step takes.
    """

    fails: Callable[[Plan], bool] = lambda plan: False
    on_broken: Callable[[Plan], None] = lambda plan: None
    spoils: Callable[[Request], bool] = lambda request: False
    slower: Callable[[], float] = lambda: 1.0


@dataclass(eq=False)
class SimStep:
    """A step in flight.

    Attributes:
        plan: what it computes.
        key: what it is compiled for.
        slots: of its shares, as they were at its start.
        indices: of the tokens that its shares sample, in the outputs of their requests.
        end_s: when it is over.
        fails: whether it will fail.
        void: a step before it has failed.
    """

    plan: Plan
    key: StepKey
    slots: list[int]
    indices: list[int]
    end_s: float
    fails: bool
    void: bool = False


@dataclass(eq=False)
class SimExecutor:
    """A device of which only the time is known, and what its memory would hold.

    Attributes:
        clock: its time.
        cost: how long steps take.
        vocab_size: sampled tokens are below it.
        contents: what memory holds; None: nobody looks.
        faults: what goes wrong.
        trace: told of each step.
        state_rows: requests that may have sampler state at once.
        weights_bytes: what `sleep` gives back.
        in_flight: steps that nobody has waited for, oldest first.
        busy_s: time that steps took.
    """

    clock: FakeClock
    cost: CostModel
    vocab_size: int
    contents: Contents | None = None
    faults: Faults = field(default_factory=Faults)
    trace: Callable[[str], None] | None = None
    state_rows: int = 8
    weights_bytes: int = 0
    asleep: bool = False
    in_flight: deque[SimStep] = field(default_factory=deque)
    busy_s: float = 0.0
    _free_s: float = 0.0
    _with_state: set[Request] = field(default_factory=set)

    def dispatch(self, plan: Plan, key: StepKey) -> SimStep:
        """Starts a step behind those in flight."""
        assert not self.asleep, "a step without weights"
        assert plan.rows <= key.shape.rows, "more rows than the bucket has"
        assert len(plan.shares) <= key.shape.seqs, "more sequences than the bucket has"
        slots, indices = [], []
        for share in plan.shares:
            self._check(share)
            request = share.request
            assert request.slot is not None
            slots.append(request.slot)
            indices.append(len(request.output_ids) + request.in_flight)
            if request.params.needs_state:
                self._with_state.add(request)
        assert len(self._with_state) <= self.state_rows, "more sampler state than rows for it"
        seconds = self.cost.step_s(_work(plan)) * self.faults.slower()
        self._free_s = max(self._free_s, self.clock()) + seconds
        self.busy_s += seconds
        step = SimStep(plan, key, slots, indices, self._free_s, self.faults.fails(plan))
        self.in_flight.append(step)
        if self.trace is not None:
            shares = (f"{s.request.id}[{s.begin}:{s.begin + s.count}]" for s in plan.shares)
            self.trace(f"dispatch {' '.join(shares)}{' (will fail)' if step.fails else ''}")
        return step

    def _check(self, share: Share) -> None:
        request = share.request
        where = f"{request.id}: share [{share.begin}, {share.begin + share.count})"
        assert share.count > 0, f"{where} is empty"
        assert share.begin == request.computed, f"{where}, but {request.computed} are computed"
        end = share.begin + share.count
        assert end <= request.num_tokens, f"{where}, but there are {request.num_tokens} tokens"
        assert share.samples == (end == request.num_tokens), f"{where} samples: {share.samples}"

    def ready(self, handle: SimStep) -> bool:
        """Whether its time is over."""
        return handle.end_s <= self.clock()

    def wait(self, handle: SimStep) -> Outcome:
        """Lets time pass until the oldest step is over. Raises StepFailed if it was to."""
        assert self.in_flight[0] is handle, "waited for out of order"
        self.in_flight.popleft()
        self.clock.wait_until(handle.end_s)
        if self.trace is not None:
            self.trace(f"settle a step of {handle.plan.rows} rows")
        # Nobody knows what is mapped there, and a step refuses to touch it.
        broken = self.contents is not None and any(
            self.contents.slot_state(slot) == "broken" for slot in handle.slots
        )
        if broken and not handle.void:
            handle.fails = True
            self.faults.on_broken(handle.plan)
        if handle.fails:
            for later in self.in_flight:
                later.void = True
        if self.contents is not None and not handle.void and not broken:
            for share, slot in zip(handle.plan.shares, handle.slots, strict=True):
                if not share.request.synthetic:
                    self.contents.compute(
                        share.request, slot, share.begin, share.count, not handle.fails
                    )
        if handle.fails:
            raise StepFailed("the step failed, as it was told to")
        return Outcome(
            [
                self._token(share.request, index)
                for share, index in zip(handle.plan.shares, handle.indices, strict=True)
                if share.samples
            ]
        )

    def _token(self, request: Request, index: int) -> int:
        if self.faults.spoils(request):
            return -1
        return sampled_token(request.seed, index, self.vocab_size)

    def give_back(self, request: Request) -> None:
        """A request gives its sampler state up."""
        self._with_state.discard(request)

    def sleep(self) -> int:
        """Gives the weights back; returns their bytes."""
        assert not self.in_flight, "asleep with a step in flight"
        self.asleep = True
        return self.weights_bytes

    def wake(self) -> None:
        """Takes the weights again."""
        self.asleep = False


def _work(plan: Plan) -> StepWork:
    """What a plan costs, counted anew."""
    work = StepWork()
    for share in plan.shares:
        if share.count == 1:
            work += StepWork.decode(share.begin + 1)
        else:
            work += StepWork.prefill(share.begin, share.count)
    return work
