"""Keys in the metadata of gRPC calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from ellm_jax.serving.errors import ServiceError
from ellm_jax.serving.grpc.status import abort
from ellm_jax.serving.tenants import Keys, Tenant, bearer_token

_OPEN_TO_ALL = "/grpc.health.v1.Health/"


def tenant_of(keys: Keys, metadata: Iterable[tuple[str, str | bytes]] | None) -> Tenant:
    """Who sends a call.

    Raises:
        ServiceError: UNAUTHENTICATED.
    """
    headers = [value for name, value in metadata or () if name == "authorization"]
    header = headers[0] if len(headers) == 1 and isinstance(headers[0], str) else None
    return keys.authenticate(bearer_token(header))


class KeyGuard(grpc.aio.ServerInterceptor):
    """Lets nobody without a key to any method, known or not, but those of health checks."""

    def __init__(self, keys: Keys):
        """Takes the keys."""
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The method's handler, or one that refuses."""
        if not handler_call_details.method.startswith(_OPEN_TO_ALL):
            try:
                tenant_of(self._keys, handler_call_details.invocation_metadata)
            except ServiceError as error:
                return _refusal(error)
        return await continuation(handler_call_details)


def _refusal(error: ServiceError) -> grpc.RpcMethodHandler:
    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
        await abort(context, error)

    # Of streams, so that it answers without waiting for a request, whatever the method's kind.
    return grpc.stream_stream_rpc_method_handler(refuse)
