"""What went wrong, as OpenAI's API says it: status codes, bodies and headers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http import replies

_CODES: dict[ErrorKind, tuple[int, str, str | None]] = {
    ErrorKind.INVALID: (400, "invalid_request_error", None),
    ErrorKind.TOO_LARGE: (413, "invalid_request_error", "too_large"),
    ErrorKind.UNAUTHENTICATED: (401, "invalid_request_error", "invalid_api_key"),
    ErrorKind.FORBIDDEN: (403, "invalid_request_error", "forbidden"),
    ErrorKind.NOT_FOUND: (404, "invalid_request_error", "not_found"),
    ErrorKind.PRECONDITION: (409, "invalid_request_error", "precondition_failed"),
    ErrorKind.OVERLOADED: (429, "rate_limit_error", "rate_limit_exceeded"),
    ErrorKind.UNAVAILABLE: (503, "server_error", "unavailable"),
    ErrorKind.DEADLINE: (504, "server_error", "deadline_exceeded"),
    # Nobody reads it; the number is what other servers log.
    ErrorKind.CANCELLED: (499, "invalid_request_error", "cancelled"),
    ErrorKind.INTERNAL: (500, "server_error", None),
}
_KINDS = {
    401: ErrorKind.UNAUTHENTICATED,
    403: ErrorKind.FORBIDDEN,
    404: ErrorKind.NOT_FOUND,
    405: ErrorKind.NOT_FOUND,
    408: ErrorKind.DEADLINE,
    413: ErrorKind.TOO_LARGE,
    429: ErrorKind.OVERLOADED,
    431: ErrorKind.TOO_LARGE,
    503: ErrorKind.UNAVAILABLE,
}
_RETRY_AFTER_S = 1.0


class HttpError(Exception):
    """An error with a status of its own, where no `ErrorKind` says it.

    Attributes:
        status: the HTTP status.
        code: OpenAI's machine-readable code; None for none.
        param: the field that is wrong; None for none.
        headers: what else the answer's head says.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message = status, message
        self.code, self.param, self.headers = code, param, headers or {}


def as_service_error(error: HttpError) -> ServiceError:
    """An error as those see it who count them."""
    kind = _KINDS.get(error.status)
    if kind is None:
        kind = ErrorKind.INTERNAL if error.status >= 500 else ErrorKind.INVALID
    return ServiceError(kind, error.message, param=error.param)


@dataclass(frozen=True)
class Answer:
    """An error, ready to be sent.

    Attributes:
        status: the HTTP status.
        error: what the body says.
        headers: what the head says beside the type and length of the body.
    """

    status: int
    error: replies.Error
    headers: dict[str, str]

    @property
    def body(self) -> bytes:
        """The body, as JSON."""
        return msgspec.json.encode(replies.ErrorReply(self.error))


def answer_of(error: ServiceError | HttpError) -> Answer:
    """How an error is told to a client."""
    if isinstance(error, HttpError):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        said = replies.Error(error.message, kind, error.param, error.code)
        return Answer(error.status, said, error.headers)
    status, kind, code = _CODES[error.kind]
    headers: dict[str, str] = {}
    if status in (429, 503):
        # Whole seconds, as HTTP wants them; at least one, lest everybody comes back at once.
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or _RETRY_AFTER_S)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Answer(status, replies.Error(error.message, kind, error.param, code), headers)
