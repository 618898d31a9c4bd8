"""The HTTP server: uvicorn, started and ended by whoever runs it."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from ellm_jax.serving.http.protocol import bounded_by
from ellm_jax.serving.settings import ServeConfig, split_address


class HttpServer(uvicorn.Server):
    """Serves an application at `ServeConfig.http`. Leaves signals to others.

    `await serve()` runs it; `should_exit = True` has it take no new connections, wait for open
    requests, and end.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig):
        """Args:
        app: from `make_app`.
        config: the address, TLS files and bounds.
        """
        assert config.http is not None, "there is no address to serve HTTP at"
        host, port = split_address(config.http)
        super().__init__(
            uvicorn.Config(
                app,
                host,
                port,
                http=bounded_by(config),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
                ssl_ca_certs=config.tls_client_ca,
                ssl_cert_reqs=ssl.CERT_REQUIRED if config.tls_client_ca else ssl.CERT_NONE,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: the process has more to end than this server."""
        yield

    @property
    def port(self) -> int:
        """The port it listens at, once `started`."""
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port
