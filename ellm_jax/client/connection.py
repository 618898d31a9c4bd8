"""How a client reaches its server: TLS, the key, and the bounds of messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
class Tls:
    """An encrypted connection.

    Attributes:
        ca: file with the authorities, in PEM, that the server's certificate comes from; None:
            those that gRPC brings.
        cert, key: files with the client's own certificate chain and private key, for servers that
            ask for one; both or none.
        server_name: the name in the server's certificate, where it is not that of the address.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC makes of it.

        Raises:
            OSError: a file cannot be read.
        """
        ca, key, cert = (
            None if file is None else Path(file).read_bytes()
            for file in (self.ca, self.key, self.cert)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


def channel_options(tls: Tls | None) -> list[tuple[str, int | str]]:
    """Options of a channel."""
    options: list[tuple[str, int | str]] = [
        # Answers are as long as what was asked for; the server bounds that.
        ("grpc.max_receive_message_length", -1),
        # Tried again here, where it is known whether a stream has begun.
        ("grpc.enable_retries", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def call_metadata(api_key: str | None) -> list[tuple[str, str]]:
    """What goes with every call."""
    return [] if api_key is None else [("authorization", f"Bearer {api_key}")]
