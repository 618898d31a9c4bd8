"""Requests that arrive in real time: latencies at a rate, and the highest rate that keeps them."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from tqdm import tqdm

from ellm_jax.bench.measure import Spread
from ellm_jax.bench.offline import make_prompts, submit
from ellm_jax.bench.slo_targets import Latencies, length_class
from ellm_jax.bench.trace_request import TraceRequest
from ellm_jax.bench.traces import at_poisson_rate, at_rate, repeated
from ellm_jax.engine import Engine
from ellm_jax.outputs import RequestOutput

ATTAINMENT = 0.9
"""The share of requests that has to be inside both targets (eLLM section 6)."""

_POLL_S = 0.05
_MAX_DOUBLINGS = 16
_MAX_HALVINGS = 4


@dataclass(frozen=True)
class Load:
    """What arrives.

    Attributes:
        requests: their lengths, in order; started again where they do not suffice.
        duration_s: for how long they arrive.
        min_requests: how many come at least, however low the rate.
        poisson: whether they come as a Poisson process, rather than as the trace has it, with all
            its pauses scaled.
    """

    requests: Sequence[TraceRequest]
    duration_s: float
    min_requests: int
    poisson: bool

    def at(self, rate_per_s: float, seed: int) -> list[TraceRequest]:
        """The arrivals at a rate.

        Raises:
            WorkloadError: the trace has no times that a rate could be given to.
        """
        count = max(self.min_requests, math.ceil(rate_per_s * self.duration_s))
        chosen = repeated(self.requests, count)
        if self.poisson:
            return at_poisson_rate(chosen, rate_per_s, seed)
        return at_rate(chosen, rate_per_s)


@dataclass(frozen=True)
class RateResult:
    """How it went at one rate.

    Attributes:
        rate_per_s: requests per second.
        requests: how many arrived, or were to.
        completed: how many gave every token.
        attainment: the share of all that was inside both targets, from 0 to 1. Where it was
            stopped early: what it could have become at most.
        stopped_early: it was clear that the attainment asked for cannot be reached.
        ttft_ms: from when a request was to arrive to its first token, of those completed.
        tpot_ms: mean time per token after it, likewise.
        preemptions: how often a request lost its memory.
    """

    rate_per_s: float
    requests: int
    completed: int
    attainment: float
    stopped_early: bool
    ttft_ms: Spread
    tpot_ms: Spread
    preemptions: int


@dataclass
class _Trial:
    """Requests under way, and which of them are known to have missed."""

    engine: Engine
    targets: Latencies
    requests: Sequence[TraceRequest]
    most_missed: int | None

    def __post_init__(self) -> None:
        self.futures: list[Future[RequestOutput]] = []
        self.start_s = time.monotonic()
        self._deadlines: list[tuple[float, int]] = []
        self._missed: set[int] = set()

    @property
    def attainment(self) -> float:
        """The share that was inside both targets, or still may be."""
        if any(not future.done() for future in self.futures) or len(self.futures) < len(
            self.requests
        ):
            return 1 - len(self._missed) / len(self.requests)
        return sum(map(self.met, range(len(self.futures)))) / len(self.requests)

    def start(self, index: int, prompt: list[int], salt: str) -> None:
        """Submits a request."""
        request = self.requests[index]
        future = submit(
            self.engine,
            prompt,
            request.output_tokens,
            request_id=f"{salt}-{index}",
            ttft_ms=self.targets.ttft_ms[length_class(request.prompt_tokens)],
            tpot_ms=self.targets.tpot_ms or None,
            cache_salt=salt,
        )
        self.futures.append(future)
        deadline_s = self.arrival_s(index) + self.targets.longest_ms(request) / 1000
        heapq.heappush(self._deadlines, (deadline_s, index))

    def arrival_s(self, index: int) -> float:
        """When a request was to arrive, on the monotonic clock."""
        return self.start_s + self.requests[index].arrival_s

    def met(self, index: int) -> bool:
        """Whether a request is over and was inside both targets."""
        future = self.futures[index]
        if not future.done():
            return False
        output = future.result()
        if len(output.token_ids) < self.requests[index].output_tokens:
            return False
        return self.targets.met_by(self.requests[index], self.arrival_s(index), output.metrics)

    def hopeless(self) -> bool:
        """Whether too many are past the time by which they had to be over, or were late."""
        if self.most_missed is None:
            return False
        while self._deadlines and self._deadlines[0][0] < time.monotonic():
            index = heapq.heappop(self._deadlines)[1]
            if not self.met(index):
                self._missed.add(index)
        return len(self._missed) > self.most_missed

    def pause_until(self, moment_s: float) -> bool:
        """Waits; returns early, with True, when it has become hopeless."""
        while not self.hopeless():
            left_s = moment_s - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(left_s, _POLL_S))
        return True

    def finish(self) -> bool:
        """Waits for all; True when it has become hopeless meanwhile."""
        while wait(self.futures, timeout=_POLL_S).not_done:
            if self.hopeless():
                return True
        return self.hopeless()

    def abandon(self, salt: str) -> None:
        """Ends what still runs."""
        for index, future in enumerate(self.futures):
            if not future.done():
                self.engine.abort(f"{salt}-{index}")
        wait(self.futures)


def run_rate(
    engine: Engine,
    requests: Sequence[TraceRequest],
    rate_per_s: float,
    targets: Latencies,
    *,
    salt: str,
    seed: int = 0,
    needed: float | None = None,
    progress: bool = False,
) -> RateResult:
    """Lets requests arrive in real time and waits until all are over.

    Args:
        engine: warm, and with nothing else to do.
        requests: with their arrivals.
        rate_per_s: of these arrivals; only noted.
        targets: what counts as met; the engine is told of them.
        salt: other than that of any run before: nothing is found in the prefix cache but what
            these requests share.
        seed: of random prompts.
        needed: stop as soon as it is clear that this attainment cannot be reached; None: never.
        progress: show a bar.
    """
    prompts = make_prompts(engine, requests, seed)
    engine.reset_stats()
    most_missed = None if needed is None else math.floor((1 - needed) * len(requests) + 1e-9)
    label = f"{rate_per_s:.3g} req/s"
    with tqdm(total=len(requests), desc=label, unit="req", disable=not progress) as bar:
        trial = _Trial(engine, targets, requests, most_missed)
        hopeless = False
        for index, prompt in enumerate(prompts):
            hopeless = trial.pause_until(trial.arrival_s(index))
            if hopeless:
                break
            trial.start(index, prompt, salt)
            trial.futures[-1].add_done_callback(lambda _: bar.update())
        hopeless = hopeless or trial.finish()
        attainment = trial.attainment
        trial.abandon(salt)
    outputs = {
        index: output
        for index, output in enumerate(future.result() for future in trial.futures)
        if len(output.token_ids) == requests[index].output_tokens
    }
    return RateResult(
        rate_per_s=rate_per_s,
        requests=len(requests),
        completed=len(outputs),
        attainment=attainment,
        stopped_early=hopeless,
        ttft_ms=Spread.of(
            [
                1000 * (output.metrics.first_token_s - trial.arrival_s(index))
                for index, output in outputs.items()
                if output.metrics.first_token_s is not None
            ]
        ),
        tpot_ms=Spread.of(
            [o.metrics.tpot_ms for o in outputs.values() if o.metrics.tpot_ms is not None]
        ),
        preemptions=engine.stats().preemptions,
    )


def highest_rate(sustains: Callable[[float], bool], first: float, tolerance: float) -> float:
    """The highest rate that is sustained, to within a factor of 1 + `tolerance`; 0.0 where none is.

    Doubles or halves `first` until one rate is sustained and the next is not, then halves the
    distance (of logarithms) between them. `first` is one at which requests hardly meet: where a
    sixteenth of it is not sustained, none is.
    """
    low, high = 0.0, math.inf
    if sustains(first):
        low = first
        for _ in range(_MAX_DOUBLINGS):
            if not sustains(2 * low):
                high = 2 * low
                break
            low *= 2
    else:
        high = first
        for _ in range(_MAX_HALVINGS):
            if sustains(high / 2):
                low = high / 2
                break
            high /= 2
    while low > 0 and high < math.inf and high > low * (1 + tolerance):
        rate = math.sqrt(low * high)
        if sustains(rate):
            low = rate
        else:
            high = rate
    return low
