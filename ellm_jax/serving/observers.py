"""Several observers as one, none of which can harm a call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ellm_jax.outputs import RequestMetrics, RequestOutput
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.tenants import Tenant

if TYPE_CHECKING:
    from ellm_jax.serving.call import Call
    from ellm_jax.serving.observer import Observer

_log = logging.getLogger(__name__)


class Observers:
    """Tells each of them everything, in order. An error of one is logged and goes no further."""

    def __init__(self, *observers: Observer):
        """Who is told."""
        self._observers = observers

    def on_admitted(self, call: Call, prompt_tokens: int) -> None:
        """Passes it on."""
        self._each(lambda observer: observer.on_admitted(call, prompt_tokens))

    def on_refused(self, error: ServiceError, tenant: Tenant) -> None:
        """Passes it on."""
        self._each(lambda observer: observer.on_refused(error, tenant))

    def on_first_token(self, call: Call, metrics: RequestMetrics) -> None:
        """Passes it on."""
        self._each(lambda observer: observer.on_first_token(call, metrics))

    def on_finished(self, call: Call, outcome: RequestOutput | ServiceError) -> None:
        """Passes it on."""
        self._each(lambda observer: observer.on_finished(call, outcome))

    def _each(self, tell: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                tell(observer)
            except Exception:
                _log.exception("%s could not take in a call", type(observer).__name__)


OUTCOMES = ("stop", "length", "abort", "error", "deadline", "unavailable")
"""How an admitted call can end; see `outcome_of`."""

_OF_KIND = {
    ErrorKind.CANCELLED: "abort",
    ErrorKind.DEADLINE: "deadline",
    ErrorKind.UNAVAILABLE: "unavailable",
    ErrorKind.OVERLOADED: "unavailable",
}


def outcome_of(outcome: RequestOutput | ServiceError) -> str:
    """How a call ended, as one of `OUTCOMES`; of several completions, the worst.

    "stop" and "length" are complete answers. "abort": the client left. "deadline": its time was
    up. "unavailable": the server was stopping, or the queue had to make way. "error": our fault.
    """
    if isinstance(outcome, ServiceError):
        return _OF_KIND.get(outcome.kind, "error")
    reasons = {completion.finish_reason for completion in outcome.outputs}
    for reason in ("error", "abort", "length"):
        if reason in reasons:
            return reason
    return "stop"
