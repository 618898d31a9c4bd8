"""Logs as lines of JSON, each with the request that it is about; a line for every call.

Neither prompts nor answers nor keys are ever logged.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from ellm_jax.outputs import RequestMetrics, RequestOutput
from ellm_jax.serving.errors import ServiceError
from ellm_jax.serving.observers import outcome_of
from ellm_jax.serving.tenants import Tenant

if TYPE_CHECKING:
    from ellm_jax.serving.call import Call

_request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "ellm_request_id", default=None
)
_log = logging.getLogger("ellm_jax.requests")
_FIELDS = "ellm_fields"
_MESSAGE_CHARS_MAX = 16_384


@contextlib.contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Lines that are logged in a with-block, and in tasks that it starts, carry this id of the
    client's request as `http_request_id`; so do those of the calls that it leads to."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, logger, message, and what is known of the
    request."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_MESSAGE_CHARS_MAX],
        }
        request_id = _request_id.get()
        if request_id is not None:
            line["http_request_id"] = request_id
        line |= getattr(record, _FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_json(level: str = "info", stream: TextIO | None = None) -> logging.Handler:
    """Has everything from this level on written as JSON to `stream` (standard error), in place of
    what was set up before; returns what writes it."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    return handler


class RequestLog:
    """An `Observer` that logs every call when it is over, and every refusal.

    Complete answers are logged at level info, others at warning, those that are the server's fault
    at error.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """`clock` gives seconds, monotonic; the engine's."""
        self._clock = clock
        self._admitted: dict[Call, tuple[float, int, str | None]] = {}

    def on_admitted(self, call: Call, prompt_tokens: int) -> None:
        """Its times count from here."""
        self._admitted[call] = (self._clock(), prompt_tokens, _request_id.get())

    def on_first_token(self, call: Call, metrics: RequestMetrics) -> None:
        """Waits for the end."""

    def on_refused(self, error: ServiceError, tenant: Tenant) -> None:
        """Logs why."""
        fields = {"tenant": tenant.name, "outcome": "refused", "reason": error.kind.value}
        if error.param is not None:
            fields["param"] = error.param
        _write(logging.WARNING, "a call was refused", fields)

    def on_finished(self, call: Call, outcome: RequestOutput | ServiceError) -> None:
        """Logs how it ended and what it took."""
        name = outcome_of(outcome)
        fields: dict[str, Any] = {"tenant": call.tenant.name, "outcome": name}
        if call.request_id is not None:
            fields["request_id"] = call.request_id
        admitted_s, prompt_tokens, http_request_id = self._admitted.pop(call, (None, None, None))
        if http_request_id is not None:
            fields["http_request_id"] = http_request_id
        if admitted_s is not None:
            fields["prompt_tokens"] = prompt_tokens
            fields["e2e_ms"] = round(1e3 * (self._clock() - admitted_s), 3)
        if isinstance(outcome, ServiceError):
            fields |= {"reason": outcome.kind.value, "error": outcome.message}
        else:
            fields |= _of_output(outcome, admitted_s)
        level = {"stop": logging.INFO, "length": logging.INFO, "error": logging.ERROR}
        _write(level.get(name, logging.WARNING), "a call is over", fields)


def _of_output(output: RequestOutput, admitted_s: float | None) -> dict[str, Any]:
    metrics = output.metrics
    fields: dict[str, Any] = {
        "request_id": output.request_id,
        "completions": len(output.outputs),
        "cached_tokens": metrics.cached_tokens,
        "output_tokens": sum(len(each.token_ids) for each in output.outputs),
        "preemptions": metrics.num_preemptions,
        "offloads": metrics.num_offloads,
    }
    if admitted_s is not None and metrics.first_scheduled_s is not None:
        fields["queue_ms"] = round(1e3 * max(0.0, metrics.first_scheduled_s - admitted_s), 3)
    if admitted_s is not None and metrics.first_token_s is not None:
        fields["ttft_ms"] = round(1e3 * max(0.0, metrics.first_token_s - admitted_s), 3)
    if metrics.tpot_ms is not None:
        fields["tpot_ms"] = round(metrics.tpot_ms, 3)
    return fields


def _write(level: int, message: str, fields: dict[str, Any]) -> None:
    _log.log(level, message, extra={_FIELDS: fields})
