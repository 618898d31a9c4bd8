"""Keys in the metadata of gRPC calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import grpc

from ellm_jax.serving.errors import ServiceError
from ellm_jax.serving.grpc.status import refusal
from ellm_jax.serving.observer import Observer, tell_refused
from ellm_jax.serving.tenants import ANONYMOUS, Keys, Tenant, bearer_token

CHECK = "/grpc.health.v1.Health/Check"
"""The one method that needs no key. Not its sibling Watch, which has no end."""


def tenant_of(keys: Keys, metadata: Iterable[tuple[str, str | bytes]] | None) -> Tenant:
    """Who sends a call.

    Raises:
        ServiceError: UNAUTHENTICATED.
    """
    headers = [value for name, value in metadata or () if name == "authorization"]
    header = headers[0] if len(headers) == 1 and isinstance(headers[0], str) else None
    return keys.authenticate(bearer_token(header))


class KeyGuard(grpc.aio.ServerInterceptor):
    """Lets nobody without a key to any method, known or not, but `CHECK`."""

    def __init__(self, keys: Keys, observer: Observer):
        """Takes the keys, and who is told of refusals."""
        self._keys = keys
        self._observer = observer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The method's handler, or one that refuses."""
        if handler_call_details.method != CHECK:
            try:
                tenant_of(self._keys, handler_call_details.invocation_metadata)
            except ServiceError as error:
                tell_refused(self._observer, error, Tenant(ANONYMOUS))
                return refusal(error)
        return await continuation(handler_call_details)
