"""From requests to the inputs of a step, and from its results back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ellm_jax.outputs import TokenLogprobs
from ellm_jax.runtime.sampler import Logprobs, SamplingInputs
from ellm_jax.scheduler.batching import Share


def sampling_inputs(shares: Sequence[Share], seqs: int) -> SamplingInputs | None:
    """Host arrays for the sampled rows; None when all are greedy and stateless."""
    requests = [share.request for share in shares if share.samples]
    if all(r.params.greedy and not r.state_row for r in requests):
        return None
    params = [r.params for r in requests]
    padding = [0] * (seqs - len(requests))
    # The noise of a token depends on its index, that of the one in flight included.
    positions = [len(r.output_ids) + r.in_flight for r in requests]
    minimum = zip(positions, params, strict=True)

    def floats(values: list[float], off: float) -> Any:
        return np.array(values + [off] * len(padding), np.float32)

    def ints(values: list[int]) -> Any:
        return np.array(values + padding, np.int32)

    return SamplingInputs(
        temperature=floats([p.temperature for p in params], 0.0),
        top_k=ints([max(0, p.top_k) for p in params]),
        top_p=floats([p.top_p for p in params], 1.0),
        min_p=floats([p.min_p for p in params], 0.0),
        repetition=floats([p.repetition_penalty for p in params], 1.0),
        presence=floats([p.presence_penalty for p in params], 0.0),
        frequency=floats([p.frequency_penalty for p in params], 0.0),
        seed=ints([r.seed - (1 << 32) if r.seed >> 31 else r.seed for r in requests]),
        position=ints(positions),
        row=ints([r.state_row for r in requests]),
        suppress_stop=ints([int(at < p.min_tokens) for at, p in minimum]),
    )


def prompt_targets(shares: Sequence[Share]) -> list[int]:
    """The prompt token that follows each row, 0 where none does."""
    targets: list[int] = []
    for share in shares:
        prompt = share.request.prompt_ids
        after = list(prompt[share.begin + 1 : share.begin + 1 + share.count])
        targets += after + [0] * (share.count - len(after))
    return targets


def take_prompt_logprobs(share: Share, logprobs: Logprobs, row: int) -> None:
    """Appends what a step found out about a request's prompt; its rows begin at `row`."""
    request = share.request
    if not request.wants_prompt_logprobs:
        return
    if not request.prompt_logprobs:
        request.prompt_logprobs.append(None)
    count = request.params.prompt_logprobs or 0
    for i in range(share.count):
        target = share.begin + i + 1
        # A request that was preempted computes rows again whose values it has.
        if target == len(request.prompt_logprobs) and target < len(request.prompt_ids):
            entry = token_logprobs(request.prompt_ids[target], logprobs, row + i, count)
            request.prompt_logprobs.append(entry)


def token_logprobs(token: int, logprobs: Logprobs, row: int, count: int) -> TokenLogprobs:
    """Row `row` of host arrays, with the `count` likeliest tokens."""
    ids, values = logprobs.top_ids[row, :count].tolist(), logprobs.top[row, :count].tolist()
    return TokenLogprobs(
        token_id=token,
        logprob=float(logprobs.chosen[row]),
        rank=int(logprobs.rank[row]),
        top=tuple(zip(ids, values, strict=True)),
    )
