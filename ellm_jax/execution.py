"""What the host loop asks of whatever runs its steps: the device, or the simulator. No JAX."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ellm_jax.memory.ledger import Lease
from ellm_jax.request import Request
from ellm_jax.runtime.shapes import StepKey, StepMode
from ellm_jax.scheduler.plan import Plan

if TYPE_CHECKING:
    from ellm_jax.runtime.sampler import Logprobs


@dataclass(frozen=True)
class Outcome:
    """What a step found out, on the host.

    Attributes:
        tokens: one per share that samples, in order; below 0: the scores are not finite.
        logprobs: of these, if asked for.
        prompt_logprobs: of the token after each row, if asked for.
    """

    tokens: Sequence[int]
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None


@dataclass(eq=False)
class DispatchedStep:
    """A step in flight.

    Attributes:
        plan: who takes part.
        handle: the executor's, to wait for.
        lease: the memory it holds.
        begin_s: when it was dispatched.
    """

    plan: Plan
    handle: Any
    lease: Lease
    begin_s: float


class Executor(Protocol):
    """Runs steps one after the other."""

    @property
    def state_rows(self) -> int:
        """Requests that may have sampler state at once."""

    def dispatch(self, plan: Plan, key: StepKey) -> Any:
        """Starts a step, its memory mapped; returns a handle for `wait`."""

    def ready(self, handle: Any) -> bool:
        """Whether `wait` would return at once."""

    def wait(self, handle: Any) -> Outcome:
        """The step's results, once they are there. Raises StepFailed."""

    def give_back(self, request: Request) -> None:
        """A request gives its sampler state up; it is made anew with its next step."""

    def sleep(self) -> int:
        """Gives the weights back; returns their bytes. No step may be in flight."""

    def wake(self) -> None:
        """Takes the weights again."""


class Steps(Protocol):
    """Knows which compiled step a batch runs on, and what it needs."""

    waited_s: float

    def collect(self) -> None:
        """Takes over what was compiled in the background."""

    def choose(self, rows: int, seqs: int, mode: StepMode) -> StepKey:
        """The step to run."""

    def ensure(self, key: StepKey) -> int:
        """Its need in bytes; compiled now if it is not. Raises CompileFailed."""

    def refine(self, rows: int, seqs: int, mode: StepMode) -> None:
        """Has the exact step compiled in the background."""

    def prepare(self, mode: StepMode) -> Future[int] | None:
        """Has steps of a mode compiled in the background; over when they are. None: they are."""

    def need_bytes(self, rows: int, seqs: int, mode: StepMode, exact: bool) -> int:
        """What the step needs that `choose` gives."""

    def close(self) -> None:
        """Gives up what waits to be compiled."""
