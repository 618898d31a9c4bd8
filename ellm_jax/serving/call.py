"""One call for completions, and the bounds that it is held to before anything is done for it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ellm_jax.sampling import SamplingParams
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.tenants import Tenant
from ellm_jax.structured.output import StructuredOutput

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
_MAX_DEADLINE_S = 7 * 86400.0


@dataclass(frozen=True, eq=False)
class Call:
    """A prompt to complete, and for whom.

    Attributes:
        prompt: its text, or its token ids.
        params: how to sample.
        tenant: who asks.
        request_id: a name for logs and traces, unique among the calls that run; None: one is made.
        priority: lower is sooner among calls of the same tenant; below 0 for admins only.
        ttft_ms, tpot_ms: latency targets in milliseconds; None: the engine's.
        deadline_s: seconds from now after which nobody waits for the answer; None: no limit.
    """

    prompt: str | Sequence[int] = field(repr=False)
    params: SamplingParams
    tenant: Tenant
    request_id: str | None = None
    priority: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    deadline_s: float | None = None


def check_call(call: Call, config: ServeConfig, max_prompt_tokens: int) -> None:
    """Holds a call to the server's bounds; whether it suits the model is checked later.

    Raises:
        ServiceError: INVALID or TOO_LARGE, with the field.
    """
    params = call.params
    if call.request_id is not None and _REQUEST_ID.fullmatch(call.request_id) is None:
        raise ServiceError(
            ErrorKind.INVALID,
            "request_id: 1 to 128 letters, digits and . _ : / - are allowed",
            param="request_id",
        )
    if call.priority < 0 and not call.tenant.admin:
        raise ServiceError(
            ErrorKind.INVALID,
            f"priority={call.priority}: below 0 needs the admin key; use 0 or more",
            param="priority",
        )
    deadline_s = call.deadline_s
    if deadline_s is not None:
        if math.isnan(deadline_s) or deadline_s > _MAX_DEADLINE_S:
            raise ServiceError(
                ErrorKind.INVALID,
                f"deadline_s={deadline_s!r}: must be at most {_MAX_DEADLINE_S:g} seconds",
                param="deadline_s",
            )
        if deadline_s <= 0:
            raise ServiceError(ErrorKind.DEADLINE, "the deadline has passed; allow more time")
    if not isinstance(call.prompt, str):
        _check_most("prompt", len(call.prompt), max_prompt_tokens, "tokens")
    elif len(call.prompt) > config.max_body_bytes:
        _check_most("prompt", len(call.prompt), config.max_body_bytes, "characters")
    _check_most("n", params.n, config.max_n, "completions")
    _check_most("stop", len(params.stop_strings), config.max_stop, "strings")
    for stop in params.stop_strings:
        _check_most("stop", len(stop), config.max_stop_chars, "characters in a string")
    _check_most("stop_token_ids", len(params.stop_token_ids or ()), config.max_stop, "tokens")
    _check_most("logit_bias", len(params.logit_bias or ()), config.max_logit_bias, "tokens")
    if params.structured is not None:
        _check_structured(params.structured, config)


def _check_structured(structured: StructuredOutput, config: ServeConfig) -> None:
    source = getattr(structured, structured.kind)
    texts = (source,) if isinstance(source, str) else source
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    _check_most("structured", size, config.max_schema_bytes, "bytes")
    if structured.json_schema is None:
        return
    assert isinstance(structured.json_schema, str)
    levels, inside = 0, [json.loads(structured.json_schema)]
    while inside := [part for whole in inside for part in _parts(whole)]:
        levels += 1
        if levels > config.max_schema_depth:
            _check_most("structured", levels, config.max_schema_depth, "levels")


def _parts(value: object) -> Collection[object]:
    """What is directly inside of an object or a list."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_most(param: str, count: int, most: int, what: str) -> None:
    if count > most:
        raise ServiceError(
            ErrorKind.TOO_LARGE,
            f"{param} has {count} {what}, and this server takes {most}; give fewer",
            param=param,
        )
