"""How a server is set up: addresses, keys, and a bound for everything that a client may send."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LOG_LEVELS = ("debug", "info", "warning", "error")
"""How much a server writes to its log."""

_MIN_KEY_CHARS = 16
_TENANT_CHARS_MAX = 64


@dataclass(frozen=True)
class ServeConfig:
    """Limits and choices of a server. Checked when made.

    Without an address of its own a transport is not started. Any address that other machines reach
    needs keys, or `allow_unauthenticated`.

    Attributes:
        model_name: what clients call the model; empty: the name of its directory.
        http: address of the OpenAI-compatible server as "host:port"; None: no such server.
        grpc: address of the gRPC server as "host:port"; None: no such server.
        api_keys: keys by the name of the tenant that has them; none: everybody may generate.
        admin_key: key of who may resize, sleep and see all tenants; None: nobody may.
        allow_unauthenticated: serve without keys on addresses that other machines reach.
        tls_cert: file with the server's certificate chain in PEM; None: no TLS.
        tls_key: file with its private key in PEM.
        tls_client_ca: file with the authorities, in PEM, that clients' certificates must come
            from; None: clients need none.
        max_queue: most completions that wait for a seat in the engine; above that, calls are
            refused until there is room.
        max_connections: most HTTP connections, and most gRPC calls, at a time.
        max_body_bytes: most bytes of a request's body or gRPC message.
        max_header_bytes: most bytes of a request's headers or gRPC metadata.
        max_prompt_tokens: most tokens of a prompt; None: what the model takes.
        max_prompts: most prompts in one request.
        max_n: most completions of one prompt.
        max_stop: most stop strings, and most stop token ids, of one prompt.
        max_stop_chars: most characters of one stop string.
        max_logit_bias: most tokens with a bias.
        max_schema_bytes: most bytes of a schema, expression or grammar for structured output.
        max_schema_depth: most levels of nesting in such a schema.
        files_dir: directory of uploaded files and batches; None: one that is removed at the end.
        max_file_bytes: most bytes of an uploaded file.
        max_files: most files, and most batches, that a tenant may have; of batches that are over
            the oldest are forgotten.
        max_tenant_file_bytes: most bytes of a tenant's files together: uploads, also while they
            come, and results of batches.
        drain_s: seconds that open streams may still take after SIGTERM.
        linger_s: seconds that a server whose engine failed still answers, as unhealthy, before it
            ends with exit code 1.
        stall_s: seconds that a client may leave a stream unread before it is ended.
        trace_to: where traces of calls are sent, as OTLP over gRPC ("http://127.0.0.1:4317"); None:
            nowhere. Needs the extra `trace`.
        log_level: "debug", "info", "warning" or "error".
    """

    model_name: str = ""
    http: str | None = None
    grpc: str | None = None
    api_keys: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    allow_unauthenticated: bool = False
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    max_queue: int = 1024
    max_connections: int = 1024
    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 16 * 2**10
    max_prompt_tokens: int | None = None
    max_prompts: int = 256
    max_n: int = 16
    max_stop: int = 16
    max_stop_chars: int = 256
    max_logit_bias: int = 1024
    max_schema_bytes: int = 64 * 2**10
    max_schema_depth: int = 32
    files_dir: str | None = None
    max_file_bytes: int = 64 * 2**20
    max_files: int = 256
    max_tenant_file_bytes: int = 2**30
    drain_s: float = 30.0
    linger_s: float = 30.0
    stall_s: float = 60.0
    trace_to: str | None = None
    log_level: str = "info"

    def __post_init__(self) -> None:
        for name in ("http", "grpc"):
            address = getattr(self, name)
            if address is not None:
                self._check_address(name, address)
        self._check_keys()
        self._check_tls()
        for name, value in vars(self).items():
            if name.startswith("max_"):
                _check_bound(name, value)
        for name in ("drain_s", "linger_s", "stall_s"):
            seconds = getattr(self, name)
            if not isinstance(seconds, int | float) or not 0 <= seconds <= 86400:
                raise ValueError(f"{name}={seconds!r}: must be from 0 to 86400 seconds")
        if self.trace_to is not None and not self.trace_to.startswith(("http://", "https://")):
            raise ValueError(f"trace_to={self.trace_to!r}: write http://HOST:PORT of a collector")
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"log_level={self.log_level!r}: there are {', '.join(LOG_LEVELS)}")

    def _check_address(self, name: str, address: str) -> None:
        host, _ = split_address(address)
        if is_loopback(host) or self.api_keys or self.allow_unauthenticated:
            return
        raise ValueError(
            f"{name}={address!r}: other machines reach this address, and there are no keys; give "
            "api_keys, or 127.0.0.1 for this machine only, or allow_unauthenticated where "
            "something in front of it checks who asks"
        )

    def _check_keys(self) -> None:
        named = {**self.api_keys, **({} if self.admin_key is None else {"admin": self.admin_key})}
        if "admin" in self.api_keys:
            raise ValueError("api_keys has a tenant named 'admin'; give that key as admin_key")
        for name, key in named.items():
            if not name or len(name) > _TENANT_CHARS_MAX or not name.isprintable():
                raise ValueError(
                    f"api_keys has a tenant {name!r}: names have 1 to {_TENANT_CHARS_MAX} "
                    "printable characters"
                )
            if len(key) < _MIN_KEY_CHARS or not key.isascii() or not key.isprintable():
                raise ValueError(
                    f"the key of {name!r} has to have {_MIN_KEY_CHARS} or more printable ASCII "
                    "characters; make one with: openssl rand -hex 32"
                )
        if len(set(named.values())) < len(named):
            raise ValueError("two tenants have the same key; give each its own")

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; give both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key as well")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port"; port 0 takes a free one.

    Raises:
        ValueError: it is neither.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{address!r} is no address; write host:port, for example 127.0.0.1:8000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host. A name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: str | Path) -> dict[str, str]:
    """Reads keys from a JSON file: {"tenant": "key", ...}.

    Raises:
        ValueError: the file is something else.
        OSError: it cannot be read.
    """
    try:
        keys = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys.values()):
        raise ValueError(f'{path} does not map tenants to keys; write {{"tenant": "key"}}')
    return keys


def _check_bound(name: str, value: object) -> None:
    if value is None and name == "max_prompt_tokens":
        return
    most = 2**53 if name == "max_tenant_file_bytes" else 2**31 - 1
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name}={value!r}: must be a whole number from 1 to {most}")
