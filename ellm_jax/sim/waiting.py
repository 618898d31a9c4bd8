"""Nobody starves: how long a request may take, from the work there was before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ellm_jax.request import PRIORITY_S, Request
from ellm_jax.scheduler.cost import StepWork
from ellm_jax.scheduler.policy import POLICIES, Rules, Sizes
from ellm_jax.sim.world import WorldConfig

_PIECE_TOKENS = 32
_ALLOWANCE = 3.0
"""How many times longer than one after the other it may take; batches make it shorter, being
computed again and waiting for copies longer."""


def alone_s(request: Request, config: WorldConfig, tokens: int) -> float:
    """How long a request takes alone, its prompt in small pieces, to give so many tokens."""
    cost, prompt = config.cost, len(request.prompt_ids)
    total = 0.0
    for begin in range(0, prompt, _PIECE_TOKENS):
        piece = min(_PIECE_TOKENS, prompt - begin)
        total += cost.step_s(StepWork.prefill(begin, piece)) + config.host_step_s
    for index in range(tokens):
        total += cost.step_s(StepWork.decode(prompt + index)) + config.host_step_s
    chunks = config.layout.chunks_for(prompt + tokens)
    return total + 2 * cost.copy_s(chunks * config.layout.chunk_bytes)


def _rank_s(request: Request) -> float:
    return request.arrival_s + PRIORITY_S * request.priority


def full_step_s(config: WorldConfig, rules: Rules) -> float:
    """How long a step may take at most beside the decodes of a request."""
    rows = rules.max_rows
    if rules.rows_beside_decodes is not None:
        rows = min(rows, rules.rows_beside_decodes)
    decodes = config.layout.num_slots * config.layout.max_tokens
    work = StepWork(rows, rows * config.layout.max_tokens, decodes)
    return config.cost.step_s(work) + config.host_step_s


def check_waits(
    requests: Sequence[Request],
    config: WorldConfig,
    restricted: Sequence[tuple[float, float]],
    failures: Mapping[Request, int],
) -> None:
    """Looks at how long each request took, against the time that all before it take one after
    the other; times in which the world was asleep, smaller, or at fault do not count. Requests
    that come later may share its steps, which makes each of them longer; with a policy that takes
    prompts first they even come before its tokens.

    Raises:
        AssertionError: one took longer than it may.
    """
    rules = POLICIES[config.policy](
        Sizes(config.layout.max_tokens, config.layout.num_slots, config.max_batch_tokens)
    )
    alone = {r: alone_s(r, config, len(r.output_ids)) for r in requests}
    compiling_s = 20 * config.compile_s
    for request in requests:
        if request.finished_s is None:
            continue
        end_s = request.finished_s
        lost_s = sum(
            max(0.0, min(end_s, end) - max(request.arrival_s, begin)) for begin, end in restricted
        )
        overlapping = [
            r
            for r in requests
            if r.finished_s is not None
            and r.finished_s >= request.arrival_s
            and r.arrival_s <= end_s
        ]
        before = [
            r
            for r in overlapping
            if r.arrival_s <= request.arrival_s or _rank_s(r) <= _rank_s(request)
        ]
        before_s = sum(alone[r] for r in before)
        beside_s = sum(alone[r] for r in overlapping) - before_s
        if not rules.prompts_first:
            beside_s = min(beside_s, len(request.output_ids) * full_step_s(config, rules))
        again = 1 + sum(failures.get(r, 0) for r in overlapping)
        allowed_s = _ALLOWANCE * again * (before_s + beside_s) + compiling_s
        took_s = end_s - request.arrival_s - lost_s
        assert took_s <= allowed_s, (
            f"{request.id} took {took_s:.4f} s; {len(before)} requests before it take "
            f"{before_s:.4f} s one after the other, and others beside it {beside_s:.4f} s"
        )
