"""From the results of a step to what a request reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ellm_jax.outputs import TokenLogprobs
from ellm_jax.scheduler.plan import Share

if TYPE_CHECKING:
    from ellm_jax.runtime.sampler import Logprobs


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
