"""Messages of the protocol to and from what the core takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ellm_jax.memory.report import MemoryReport
from ellm_jax.outputs import (
    CompletionDelta,
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from ellm_jax.protocol.v1 import ellm_pb2 as pb
from ellm_jax.sampling import SamplingParams
from ellm_jax.serving.call import Call
from ellm_jax.serving.errors import ErrorKind, ServiceError, refused
from ellm_jax.serving.info import ModelInfo, ServiceStats
from ellm_jax.serving.tenants import Tenant
from ellm_jax.structured.output import StructuredOutput

_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def refuse_unknown_fields(message: Message, path: str = "") -> None:
    """Raises ServiceError (INVALID) if a message has fields that this version does not know: what
    they ask for would be left out without a word."""
    for unknown in UnknownFieldSet(message):
        name = f"{path or message.DESCRIPTOR.name}.{unknown.field_number}"
        raise ServiceError(
            ErrorKind.INVALID,
            f"field {name} is unknown to this server; leave it out, or use a newer server",
            param=name,
        )
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        parts: Iterable[Message] = value if field.is_repeated else (value,)
        for part in parts:
            refuse_unknown_fields(part, f"{path}.{field.name}" if path else field.name)


def call_of(request: pb.GenerateRequest, tenant: Tenant, deadline_s: float | None) -> Call:
    """The call that a message asks for.

    Raises:
        ServiceError: INVALID.
    """
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise ServiceError(
            ErrorKind.INVALID, "there is no prompt; give text or token_ids", param="prompt"
        )
    return Call(
        prompt=request.text if kind == "text" else list(request.token_ids.ids),
        params=sampling_params(request.sampling),
        tenant=tenant,
        request_id=request.request_id or None,
        priority=request.priority,
        ttft_ms=request.ttft_ms if request.HasField("ttft_ms") else None,
        tpot_ms=request.tpot_ms if request.HasField("tpot_ms") else None,
        deadline_s=deadline_s,
    )


def sampling_params(sampling: pb.Sampling) -> SamplingParams:
    """The parameters that are set in a message; the others as the class has them.

    Raises:
        ServiceError: INVALID, with the field.
    """
    values: dict[str, Any] = {}
    for field, value in sampling.ListFields():
        if field.name == "logit_bias":
            value = dict(value)
        elif field.name == "structured":
            value = _structured(value)
        elif field.is_repeated:
            value = tuple(value)
        values[field.name] = value
    if values.pop("unlimited", False):
        if "max_tokens" in values:
            raise ServiceError(
                ErrorKind.INVALID, "unlimited and max_tokens exclude each other", param="unlimited"
            )
        values["max_tokens"] = None
    try:
        return SamplingParams(**values)
    except (ValueError, TypeError) as error:
        raise refused(error) from error


def _structured(message: pb.Structured) -> StructuredOutput:
    form = message.WhichOneof("form")
    values = {} if form is None else {form: getattr(message, form)}
    if form == "choice":
        values[form] = tuple(message.choice.texts)
    try:
        return StructuredOutput(**values)
    except (ValueError, TypeError) as error:
        raise refused(error, "structured") from error


def delta(new: CompletionDelta) -> pb.Completion:
    """What is new of a completion."""
    message = pb.Completion(index=new.index, text=new.text, token_ids=new.token_ids)
    if new.finish_reason is not None:
        _set_end(message, new)
    if new.logprobs:
        message.logprobs.extend(_logprobs(new.logprobs))
    return message


def completion(output: CompletionOutput) -> pb.Completion:
    """A whole completion."""
    message = pb.Completion(
        index=output.index,
        text=output.text,
        token_ids=output.token_ids,
        logprobs=_logprobs(output.logprobs or ()),
    )
    _set_end(message, output)
    return message


def response(output: RequestOutput) -> pb.GenerateResponse:
    """The answer to a call that is over."""
    return pb.GenerateResponse(
        request_id=output.request_id,
        completions=[completion(each) for each in output.outputs],
        usage=usage(
            len(output.prompt_token_ids),
            sum(len(each.token_ids) for each in output.outputs),
            output.metrics,
        ),
        prompt_token_ids=output.prompt_token_ids,
        prompt_logprobs=_logprobs(output.prompt_logprobs or ()),
    )


def first_response(output: RequestOutput) -> pb.GenerateStreamResponse:
    """What the first message of a stream has beside its deltas."""
    return pb.GenerateStreamResponse(
        request_id=output.request_id, prompt_logprobs=_logprobs(output.prompt_logprobs or ())
    )


def usage(prompt_tokens: int, completion_tokens: int, metrics: RequestMetrics) -> pb.Usage:
    """What a call took."""
    queue_ms = None
    if metrics.first_scheduled_s is not None:
        queue_ms = 1e3 * (metrics.first_scheduled_s - metrics.arrival_s)
    return pb.Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cached_tokens=metrics.cached_tokens,
        queue_ms=queue_ms,
        ttft_ms=metrics.ttft_ms,
        tpot_ms=metrics.tpot_ms,
        e2e_ms=metrics.e2e_ms,
        preemptions=metrics.num_preemptions,
        offloads=metrics.num_offloads,
    )


def model(info: ModelInfo) -> pb.GetModelResponse:
    """What is served."""
    return pb.GetModelResponse(
        name=info.name,
        family=info.family,
        dtype=info.dtype,
        quantization=info.quantization or "",
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        has_tokenizer=info.has_tokenizer,
    )


def memory(report: MemoryReport) -> pb.Memory:
    """Bytes by owner and tier."""
    names = [field.name for field in pb.Memory.DESCRIPTOR.fields]
    return pb.Memory(**{name: getattr(report, name) for name in names})


def memory_response(report: MemoryReport, stats: ServiceStats) -> pb.GetMemoryResponse:
    """Bytes by owner, and whose they are."""
    return pb.GetMemoryResponse(
        memory=memory(report),
        running=stats.engine.running,
        waiting=stats.engine.waiting + stats.queued,
        offloaded=stats.engine.offloaded + stats.engine.moving,
    )


def _set_end(message: pb.Completion, ended: CompletionDelta | CompletionOutput) -> None:
    message.finish_reason = _REASONS.get(ended.finish_reason or "", pb.FINISH_REASON_UNSPECIFIED)
    if isinstance(ended.stop_reason, str):
        message.stop = ended.stop_reason
    elif ended.stop_reason is not None:
        message.stop_token_id = ended.stop_reason


def _logprobs(entries: Sequence[TokenLogprobs | None]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs()
        if entry is None
        else pb.TokenLogprobs(
            token_id=entry.token_id,
            logprob=entry.logprob,
            rank=entry.rank,
            top=[pb.TokenLogprob(token_id=t, logprob=p) for t, p in entry.top],
        )
        for entry in entries
    ]
