"""Requests as messages, and messages as results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import grpc

from ellm_jax.client.errors import ClientError
from ellm_jax.client.results import Generation, GenerationDelta, Memory, Model, Usage
from ellm_jax.outputs import CompletionDelta, CompletionOutput, FinishReason, TokenLogprobs
from ellm_jax.protocol.v1 import ellm_pb2 as pb
from ellm_jax.sampling import SamplingParams
from ellm_jax.structured.output import StructuredOutput

_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def generate_request(
    prompt: str | Sequence[int],
    params: SamplingParams | None = None,
    *,
    request_id: str = "",
    priority: int = 0,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
) -> pb.GenerateRequest:
    """The message that asks for completions of a prompt."""
    message = pb.GenerateRequest(
        sampling=sampling(params or SamplingParams()),
        request_id=request_id,
        priority=priority,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
    )
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    return message


def sampling(params: SamplingParams) -> pb.Sampling:
    """The fields in which parameters differ from their defaults."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if value != field.default:
            values[field.name] = value
    if "max_tokens" in values and values["max_tokens"] is None:
        del values["max_tokens"]
        values["unlimited"] = True
    if values.get("seed", 0) >= 2**63:
        values["seed"] -= 2**64  # the same bits
    if "structured" in values:
        values["structured"] = _structured(values["structured"])
    return pb.Sampling(**values)


def _structured(form: StructuredOutput) -> pb.Structured:
    if form.choice is not None:
        return pb.Structured(choice=pb.Choices(texts=form.choice))
    return pb.Structured(**{form.kind: getattr(form, form.kind)})


def generation(message: pb.GenerateResponse) -> Generation:
    """A call that is over."""
    return Generation(
        request_id=message.request_id,
        completions=tuple(_completion(each) for each in message.completions),
        usage=_usage(message.usage),
        prompt_token_ids=tuple(message.prompt_token_ids),
        prompt_logprobs=_prompt_logprobs(message),
    )


def generation_delta(message: pb.GenerateStreamResponse, request_id: str) -> GenerationDelta:
    """What is new of a stream."""
    return GenerationDelta(
        request_id=request_id,
        deltas=tuple(
            CompletionDelta(
                index=each.index,
                text=each.text,
                token_ids=tuple(each.token_ids),
                finish_reason=_REASONS.get(each.finish_reason),
                stop_reason=_stop_reason(each),
                logprobs=_logprobs(each),
            )
            for each in message.deltas
        ),
        usage=_usage(message.usage) if message.HasField("usage") else None,
        prompt_logprobs=_prompt_logprobs(message),
    )


def batch_result(message: pb.GenerateBatchResponse) -> Generation | ClientError:
    """What became of one request of a batch."""
    if message.WhichOneof("result") == "response":
        return generation(message.response)
    error = message.error
    return ClientError(
        _CODES.get(error.code, grpc.StatusCode.UNKNOWN),
        error.message,
        fields=(error.field,) if error.field else (),
        retry_after_s=error.retry_after_s if error.HasField("retry_after_s") else None,
    )


def model(message: pb.GetModelResponse) -> Model:
    """The model that is served."""
    return Model(**_values(message))


def memory(message: pb.Memory) -> Memory:
    """Bytes by owner."""
    return Memory(**_values(message))


def _values(message: Any) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def _completion(message: pb.Completion) -> CompletionOutput:
    logprobs = _logprobs(message)
    return CompletionOutput(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_REASONS.get(message.finish_reason),
        stop_reason=_stop_reason(message),
        cumulative_logprob=None if logprobs is None else sum(e.logprob for e in logprobs),
        logprobs=logprobs,
    )


def _stop_reason(message: pb.Completion) -> str | int | None:
    kind = message.WhichOneof("stopped_by")
    return None if kind is None else getattr(message, kind)


def _logprobs(message: pb.Completion) -> tuple[TokenLogprobs, ...] | None:
    return tuple(_token(entry) for entry in message.logprobs) or None


def _prompt_logprobs(
    message: pb.GenerateResponse | pb.GenerateStreamResponse,
) -> tuple[TokenLogprobs | None, ...] | None:
    entries = (None if entry.rank == 0 else _token(entry) for entry in message.prompt_logprobs)
    return tuple(entries) or None


def _token(entry: pb.TokenLogprobs) -> TokenLogprobs:
    top = tuple((each.token_id, each.logprob) for each in entry.top)
    return TokenLogprobs(entry.token_id, entry.logprob, entry.rank, top)


def _usage(message: pb.Usage) -> Usage:
    values = _values(message)
    for name in ("queue_ms", "ttft_ms", "tpot_ms", "e2e_ms"):
        if not message.HasField(name):
            values[name] = None
    return Usage(**values)
