"""A gRPC server over the core: our service, standard health and reflection."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ellm_jax.protocol.v1 import ellm_pb2, ellm_pb2_grpc
from ellm_jax.serving.grpc.keys import KeyGuard
from ellm_jax.serving.grpc.malformed import ReadingGuard
from ellm_jax.serving.grpc.places import SPARE, WATCHES_MAX, Places
from ellm_jax.serving.grpc.servicer import EngineServicer
from ellm_jax.serving.grpc.stalls import Stalls
from ellm_jax.serving.service import Service
from ellm_jax.serving.settings import ServeConfig, split_address
from ellm_jax.serving.tenants import Keys

SERVICE = str(ellm_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name)
"""The full name of our service, as health checks and reflection know it."""

_HEALTH_S = 0.25
_KEEPALIVE_MS, _KEEPALIVE_TIMEOUT_MS = 30_000, 10_000


class GrpcServer:
    """Serves the core on one address. Lives on the core's event loop."""

    def __init__(self, service: Service, keys: Keys, config: ServeConfig):
        """Takes the core, who may ask it, and the bounds."""
        self._service = service
        self._config = config
        self._stalls = Stalls(config.stall_s)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[
                KeyGuard(keys, service.observer),
                Places(config.max_connections, keys, service.observer, self._health),
                ReadingGuard(SERVICE),
            ],
            options=_options(config),
            maximum_concurrent_rpcs=config.max_connections + WATCHES_MAX + SPARE,
        )
        ellm_pb2_grpc.add_EngineServiceServicer_to_server(
            EngineServicer(service, keys, self._stalls), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        self._watching: list[asyncio.Task[None]] = []

    async def start(self, address: str) -> int:
        """Listens; the port, which the system chose where the address has 0.

        Raises:
            OSError: the address cannot be had, or a file with keys or certificates not be read.
            ValueError: keys or certificates are none.
        """
        split_address(address)
        credentials = _credentials(self._config)
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {address}: {error}") from error
        if not port:
            raise OSError(f"gRPC cannot listen on {address}; is it in use?")
        await self._report_health()
        await self._server.start()
        self._watching = [
            asyncio.create_task(self._keep_reporting()),
            asyncio.create_task(self._stalls.watch()),
        ]
        return int(port)

    async def stop(self, grace_s: float) -> None:
        """Takes no more calls, and ends those that are left after so many seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        for task in self._watching:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _report_health(self) -> None:
        ready = self._service.ready
        status = health_pb2.HealthCheckResponse.ServingStatus
        for name in ("", SERVICE):
            await self._health.set(name, status.SERVING if ready else status.NOT_SERVING)

    async def _keep_reporting(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_S)
            await self._report_health()


def _options(config: ServeConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", config.max_header_bytes),
        ("grpc.absolute_max_metadata_size", config.max_header_bytes),
        ("grpc.max_concurrent_streams", config.max_connections + WATCHES_MAX + SPARE),
        # A second server on the same port is a mistake; without this it would share the calls.
        ("grpc.so_reuseport", 0),
        # Finds clients that are gone without a word.
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_TIMEOUT_MS),
    ]


def _credentials(config: ServeConfig) -> grpc.ServerCredentials | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    pair = (Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())
    authorities = None
    if config.tls_client_ca is not None:
        authorities = Path(config.tls_client_ca).read_bytes()
    return grpc.ssl_server_credentials(
        [pair], root_certificates=authorities, require_client_auth=authorities is not None
    )
