"""What can go wrong with a call, in words that no transport owns."""

from __future__ import annotations

import dataclasses
import enum
import re

from ellm_jax.sampling import SamplingParams

_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}
_FIELDS |= {"request_id", "priority", "ttft_ms", "tpot_ms", "device_memory", "host_memory"}
_FIELD = re.compile(r"[a-z]\w*(?=[=\[ ])")


class ErrorKind(enum.Enum):
    """Why a call failed; each transport has its own code for it."""

    INVALID = "invalid"  # makes no sense, whoever asks and whenever
    TOO_LARGE = "too_large"  # above a bound of this server
    UNAUTHENTICATED = "unauthenticated"  # no key, or an unknown one
    FORBIDDEN = "forbidden"  # a key that may not do this
    NOT_FOUND = "not_found"  # no such model or route
    PRECONDITION = "precondition"  # not in the state that the engine is in now
    OVERLOADED = "overloaded"  # the queue is full: later
    UNAVAILABLE = "unavailable"  # starting, draining, or the engine is gone: elsewhere or later
    DEADLINE = "deadline"  # the caller's time is up
    CANCELLED = "cancelled"  # the caller has left
    INTERNAL = "internal"  # our fault


class ServiceError(Exception):
    """A call that failed, with what a client needs to know.

    Attributes:
        kind: why.
        message: for people: what was asked, what there is, one remedy.
        param: the field at fault, as in `SamplingParams` or "prompt"; None where there is none.
        retry_after_s: seconds after which trying again makes sense; None where it does not.
        told: whether the observer knows of it already.
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.told = False


def refused(error: Exception, default_param: str | None = None) -> ServiceError:
    """What the engine refuses with ValueError or TypeError, as a ServiceError. Messages about a
    field begin with its name, which becomes `param`; others are about `default_param`."""
    message = str(error) or type(error).__name__
    named = _FIELD.match(message.replace("request id", "request_id", 1))
    known = named is not None and named[0] in _FIELDS
    param = named[0] if named is not None and known else default_param
    return ServiceError(ErrorKind.INVALID, message, param=param)
