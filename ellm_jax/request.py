"""A request while the engine has it: what it asked for and how far it is."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ellm_jax.outputs import FinishReason, TokenLogprobs
from ellm_jax.sampling import SamplingParams

if TYPE_CHECKING:
    from ellm_jax.memory.host_tier import HostCopy
    from ellm_jax.memory.prefix import TileKeys
    from ellm_jax.structured.matcher import Matcher

PRIORITY_S = 10.0
"""A level of priority is worth so many seconds of waiting."""


class Status(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    LEAVING = "leaving"  # on its way to host memory; has a slot
    OFFLOADED = "offloaded"  # in host memory only
    FETCHING = "fetching"  # on its way back; has a slot
    FINISHED = "finished"


@dataclass(eq=False, slots=True, weakref_slot=True)
class Request:
    """One completion of one prompt. Compared and hashed by identity.

    Attributes:
        id: unique in the engine.
        prompt_ids: the prompt.
        params: how to sample; `max_tokens` is set.
        seed: of its noise, 32 bits.
        stop_ids: tokens that end it, the model's end-of-text tokens included unless ignored.
        arrival_s: when the engine was given it.
        output_ids: tokens that have reached the host.
        logprobs: one entry per output token, if asked for.
        prompt_logprobs: one entry per prompt token computed so far, if asked for.
        priority: lower is sooner; see `rank`.
        number: in the order in which the scheduler was given them.
        ttft_ms, tpot_ms: targets; None for none.
        salt: requests with different salts share no prefixes.
        slot: its KV slot while it has one.
        computed: leading tokens whose K and V are written, or will be by steps in flight.
        settled: leading tokens whose K and V are written for certain.
        in_flight: tokens sampled by steps in flight, not yet known here.
        state_row: its row of the sampler state; 0 for none.
        keys: names of its full tiles; None where prefixes are not kept.
        pinned: leading tiles that it shares with the prefix cache.
        cached_tokens: prompt tokens that were found instead of computed, when it first ran.
        host: what of its KV lies in host memory; None: nothing.
        left_s: when it last left for host memory.
        copy_failed: a copy of its KV to host memory failed; it is not tried again.
        parked: not to be planned: it leaves for host memory when no step names it.
        to_host: admitted to leave for host memory after its first token.
        matcher: which tokens may come next, after `output_ids`; None: any.
        max_tokens: most tokens it may generate.
        wants_logprobs: whether any log probabilities are asked for.
        synthetic: its prompt counts as computed, whatever is in its memory; for measuring decodes
            behind contexts that take minutes to prefill.
        num_preemptions: how often it lost its slot.
        num_failures: how many steps with it, and it to blame, failed since the last good one.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    arrival_s: float
    priority: int = 0
    number: int = -1
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    salt: bytes = b""
    matcher: Matcher | None = None
    synthetic: bool = False
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    status: Status = Status.WAITING
    slot: int | None = None
    computed: int = 0
    settled: int = 0
    in_flight: int = 0
    state_row: int = 0
    keys: TileKeys | None = None
    pinned: int = 0
    cached_tokens: int = 0
    host: HostCopy | None = None
    left_s: float = 0.0
    copy_failed: bool = False
    parked: bool = False
    to_host: bool = False
    num_preemptions: int = 0
    num_offloads: int = 0
    num_failures: int = 0
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    max_tokens: int = field(init=False)
    wants_logprobs: bool = field(init=False)

    def __post_init__(self) -> None:
        params = self.params
        assert params.max_tokens is not None
        self.max_tokens = params.max_tokens
        self.wants_logprobs = params.logprobs is not None or params.prompt_logprobs is not None

    @property
    def suspect(self) -> bool:
        """Whether a step with it failed, and none has succeeded since."""
        return self.num_failures > 0

    @property
    def rank(self) -> tuple[float, int]:
        """What it waits in order of, in seconds; of equals, who came first. A level of priority
        counts as ten seconds of waiting, so that nobody waits for ever behind those of better
        priority."""
        return self.arrival_s + self.priority * PRIORITY_S, self.number

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, those in flight included."""
        return len(self.prompt_ids) + len(self.output_ids) + self.in_flight

    @property
    def max_total_tokens(self) -> int:
        """Most tokens it can come to hold: its last token is never written to the KV cache."""
        return len(self.prompt_ids) + self.max_tokens - 1

    @property
    def remaining(self) -> int:
        """Tokens still to compute before the next one can be sampled; 0 when all are sampled."""
        sampled = len(self.output_ids) + self.in_flight
        if sampled >= self.max_tokens:
            return 0
        return len(self.prompt_ids) + sampled - self.computed

    @property
    def decodes(self) -> bool:
        """Whether its next token can be planned, and that alone. What follows a token in flight may
        depend on it: then it cannot be before the token is known."""
        sampled = len(self.output_ids) + self.in_flight
        return (
            self.computed + 1 == len(self.prompt_ids) + sampled
            and sampled < self.max_tokens
            and not self.parked
            and (self.matcher is None or self.in_flight == 0)
        )

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log probabilities of its prompt are still to be reported."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(
            self.prompt_ids
        )

    def tokens(self, begin: int, end: int) -> list[int]:
        """Token ids [begin, end); -1 for the one in flight."""
        known = len(self.prompt_ids)
        if end <= known:
            return list(self.prompt_ids[begin:end])
        ids = list(self.prompt_ids[begin:known]) if begin < known else []
        ids += self.output_ids[max(0, begin - known) : end - known]
        return ids + [-1] * (end - begin - len(ids))

    def restart(self) -> None:
        """Forgets what was computed, to be prefilled anew with its output as part of the prompt."""
        assert self.in_flight == 0, "tokens in flight would be lost"
        self.slot = None
        self.computed = 0
        self.settled = 0
        self.state_row = 0
        self.parked = False
        self.to_host = False
        self.status = Status.WAITING
