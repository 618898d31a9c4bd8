"""Keeps pages of the web away from a server without keys.

A browser lets any page send requests to 127.0.0.1, and to a name that its owner has point there.
Keys keep such a page out; without them, what the browser says of the page has to.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.settings import ServeConfig, is_loopback, split_address

_REMEDY = "start the server with keys (--api-keys-file) to let pages from elsewhere in"


class Origins:
    """Checks the heads of requests."""

    def __init__(self, config: ServeConfig):
        """Takes the address, and whether there are keys."""
        self._open = not config.api_keys
        bound = None if config.http is None else split_address(config.http)[0]
        # With something in front of it, the server is asked by the name of that.
        local = bound is not None and is_loopback(bound) and not config.allow_unauthenticated
        self._names_checked = self._open and local

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Lets a request pass, or not.

        Raises:
            ServiceError: FORBIDDEN: a page from elsewhere sent it.
        """
        host = _host_name(b"//" + headers.get(b"host", b""))
        if self._names_checked and not _is_here(host):
            raise ServiceError(
                ErrorKind.FORBIDDEN,
                f"the host is {host[:200]!r}, and this server is for this machine; ask 127.0.0.1, "
                f"or {_REMEDY}",
            )
        if self._open and _from_elsewhere(headers, host):
            raise ServiceError(
                ErrorKind.FORBIDDEN, f"a page from elsewhere has sent this; {_REMEDY}"
            )


def _from_elsewhere(headers: Mapping[bytes, bytes], host: str) -> bool:
    """Whether the browser says that a page of another site asks."""
    if headers.get(b"sec-fetch-site", b"").lower() == b"cross-site":
        # Who follows a link sees the answer; the page with the link does not.
        return headers.get(b"sec-fetch-mode") != b"navigate" or b"origin" in headers
    origin = headers.get(b"origin")
    if origin is None:
        return False
    name = _host_name(origin)
    return not name or (name != host and not is_loopback(name))


def _is_here(name: str) -> bool:
    """Whether a name can only be this machine's. Names without a dot are nobody's on the web; a
    request without any is no browser's."""
    return is_loopback(name) or name.endswith(".localhost") or not set(name) & set(".:")


def _host_name(address: bytes) -> str:
    """The name in an origin or "//host:port"; empty where there is none."""
    try:
        return (urlsplit(address.decode("latin-1")).hostname or "").rstrip(".").lower()
    except ValueError:
        return "..."  # nobody's
