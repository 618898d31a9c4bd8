"""How memory is divided: the ways that are compared, and eLLM's own, behind one method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

CHUNK_TOKENS = 512
"""Tokens of a step in the chunked baseline, as vLLM and the paper have it."""

_ELASTIC_TOKENS = 2048


@dataclass(frozen=True)
class Rules:
    """What a policy decides once, before anything runs.

    Attributes:
        max_rows: most tokens of a step.
        reserved_rows: activations hold what a step of so many tokens needs, at all times; 0: what
            the steps in flight need.
        whole_prompts: a prompt is prefilled in one step.
        prompts_first: steps take prompts while one fits, else decodes; never both.
        rows_beside_decodes: most tokens of a step that decodes too, where no TPOT target says how
            long it may take; None: `max_rows`.
        host_tier: KV may go to host memory and come back.
    """

    max_rows: int
    reserved_rows: int = 0
    whole_prompts: bool = False
    prompts_first: bool = False
    rows_beside_decodes: int | None = None
    host_tier: bool = False


@dataclass(frozen=True)
class Sizes:
    """What a policy may go by.

    Attributes:
        max_model_len: most tokens of a request.
        max_num_seqs: most requests that run at once.
        max_batch_tokens: most tokens of a step, where the user says so.
    """

    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int | None


Policy = Callable[[Sizes], Rules]
"""From what a policy may go by to its rules."""


def static(sizes: Sizes) -> Rules:
    """Activations are reserved for the longest prompt and prompts are prefilled whole, before
    decodes: vLLM's way without chunked prefill, the paper's first baseline."""
    rows = max(sizes.max_model_len, sizes.max_batch_tokens or 0)
    return Rules(rows, reserved_rows=rows, whole_prompts=True, prompts_first=True)


def static_chunked(sizes: Sizes) -> Rules:
    """Activations are reserved for one step of fixed size, in which decodes go first and pieces of
    prompts fill up: vLLM's chunked prefill, the paper's second baseline."""
    rows = sizes.max_batch_tokens or CHUNK_TOKENS
    return Rules(rows, reserved_rows=max(rows, sizes.max_num_seqs))


def intra(sizes: Sizes) -> Rules:
    """Memory moves between activations and KV, within the device only."""
    rows = sizes.max_batch_tokens or _ELASTIC_TOKENS
    return Rules(rows, rows_beside_decodes=CHUNK_TOKENS)


def inter(sizes: Sizes) -> Rules:
    """As `static`, with KV that may go to host memory: the second half of eLLM alone."""
    rows = max(sizes.max_model_len, sizes.max_batch_tokens or 0)
    return Rules(rows, reserved_rows=rows, whole_prompts=True, prompts_first=True, host_tier=True)


def elastic(sizes: Sizes) -> Rules:
    """eLLM: memory moves between activations and KV, and KV between device and host."""
    rows = sizes.max_batch_tokens or _ELASTIC_TOKENS
    return Rules(rows, rows_beside_decodes=CHUNK_TOKENS, host_tier=True)


POLICIES: dict[str, Policy] = {
    "static": static,
    "static-chunked": static_chunked,
    "intra": intra,
    "inter": inter,
    "elastic": elastic,
}
"""Every policy by the name that users give."""
