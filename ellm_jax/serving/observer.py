"""What a server tells whoever counts, traces and logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ellm_jax.outputs import RequestMetrics, RequestOutput
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.tenants import Tenant

if TYPE_CHECKING:
    from ellm_jax.serving.call import Call


class Observer(Protocol):
    """Is told of every call, on the event loop; must be quick and must not raise. A call that was
    admitted ends with exactly one `on_finished`; `Call` objects are the same in all of them."""

    def on_admitted(self, call: Call, prompt_tokens: int) -> None:
        """A call was checked and queued."""

    def on_refused(self, error: ServiceError, tenant: Tenant) -> None:
        """A call was refused before anything was done for it."""

    def on_first_token(self, call: Call, metrics: RequestMetrics) -> None:
        """The first tokens of a call reached the event loop."""

    def on_finished(self, call: Call, outcome: RequestOutput | ServiceError) -> None:
        """A call is over: everything that it gave, or why there is nothing more. A client that
        left is an error of kind CANCELLED."""


class NullObserver:
    """Looks away."""

    def on_admitted(self, call: Call, prompt_tokens: int) -> None:
        """Nothing."""

    def on_refused(self, error: ServiceError, tenant: Tenant) -> None:
        """Nothing."""

    def on_first_token(self, call: Call, metrics: RequestMetrics) -> None:
        """Nothing."""

    def on_finished(self, call: Call, outcome: RequestOutput | ServiceError) -> None:
        """Nothing."""


_NO_REFUSALS = (ErrorKind.INTERNAL, ErrorKind.CANCELLED)


def tell_refused(observer: Observer, error: ServiceError, tenant: Tenant) -> None:
    """Tells of a refusal, once: an error passes several places that could. What is the server's
    fault, and clients that left, are no refusals."""
    if not error.told and error.kind not in _NO_REFUSALS:
        error.told = True
        observer.on_refused(error, tenant)
