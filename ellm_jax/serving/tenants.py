"""Who asks: tenants by their keys."""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.settings import ServeConfig

ANONYMOUS = "anonymous"
"""The tenant of everybody where there are no keys."""


@dataclass(frozen=True)
class Tenant:
    """Who asks, and what they may do.

    Attributes:
        name: as in `ServeConfig.api_keys`.
        admin: whether limits may be changed and other tenants seen.
    """

    name: str
    admin: bool = False

    @property
    def cache_salt(self) -> str:
        """Keeps tenants from finding out each other's prompts by how fast a prefix is there."""
        return hashlib.sha256(f"ellm tenant {self.name}".encode()).hexdigest()

    def require_admin(self, what: str) -> None:
        """Raises ServiceError (FORBIDDEN) unless `admin`; `what` says what was asked for."""
        if not self.admin:
            raise ServiceError(
                ErrorKind.FORBIDDEN,
                f"{what} needs the admin key, and {self.name!r} has none; ask with that key, or "
                "start the server with one (--admin-key-file)",
            )


class Keys:
    """Knows every key. Comparing takes as long for wrong keys as for right ones."""

    def __init__(self, config: ServeConfig):
        """Takes the keys of a configuration."""
        self._tenants = [(_digest(key), Tenant(name)) for name, key in config.api_keys.items()]
        self.required = bool(self._tenants)
        if config.admin_key is not None:
            self._tenants.append((_digest(config.admin_key), Tenant("admin", admin=True)))

    def authenticate(self, token: str | None) -> Tenant:
        """The tenant that a key belongs to; without keys, the anonymous one for no token.

        Raises:
            ServiceError: UNAUTHENTICATED: no token where one is needed, or an unknown one.
        """
        if token is None:
            if self.required:
                raise ServiceError(
                    ErrorKind.UNAUTHENTICATED,
                    "there is no API key; send one as: authorization: Bearer KEY",
                )
            return Tenant(ANONYMOUS)
        given = _digest(token)
        found: Tenant | None = None
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, given):
                found = tenant
        if found is not None:
            return found
        if not self.required:
            # Clients of services with keys always send one; here it says nothing.
            return Tenant(ANONYMOUS)
        raise ServiceError(ErrorKind.UNAUTHENTICATED, "the API key is unknown; check it")


def bearer_token(header: str | None) -> str | None:
    """The token of an "authorization" header; None without one, or with another scheme."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def basic_password(header: str | None) -> str | None:
    """The password of an "authorization" header of scheme Basic, which is how browsers send a key
    that they asked a person for; None without one, or with another scheme."""
    scheme, _, encoded = (header or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        text = base64.b64decode(encoded.strip(), validate=True).decode()
    except ValueError:
        return None
    return text.partition(":")[2] or None


def _digest(key: str) -> bytes:
    # Of equal length whatever the key's, so that comparing tells nothing about it.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
