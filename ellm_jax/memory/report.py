"""The ledger as people and scripts read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ellm_jax.config import format_bytes
from ellm_jax.memory.ledger import OWNERS


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by owner; `free + kv + cache + activation + weights + workspace == limit`.

    Attributes:
        limit_bytes: what the engine may take.
        free_bytes: what nobody owns; includes `available_bytes` and `backed_bytes`.
        kv_bytes: chunks of running requests.
        cache_bytes: finished prefixes kept for reuse.
        activation_bytes: temporaries of the steps in flight.
        weights_bytes: the model.
        workspace_bytes: the engine's own device arrays.
        available_bytes: still mapped in slots of ended requests.
        backed_bytes: unmapped, with the physical memory kept.
        physical_bytes: what is taken from the system.
        host_limit_bytes, host_used_bytes: of the host tier; 0 where there is none.
        peaks: the highest values by owner since the start or the last reset.
    """

    limit_bytes: int
    free_bytes: int
    kv_bytes: int
    cache_bytes: int
    activation_bytes: int
    weights_bytes: int
    workspace_bytes: int
    available_bytes: int
    backed_bytes: int
    physical_bytes: int
    peaks: Mapping[str, int]
    host_limit_bytes: int = 0
    host_used_bytes: int = 0

    @classmethod
    def from_usage(
        cls, usage: Mapping[str, int], host: Mapping[str, int] | None = None
    ) -> MemoryReport:
        """Reads the native ledger's picture, and that of the host tier."""
        return cls(
            limit_bytes=usage["limit"],
            **{f"{owner}_bytes": usage[owner] for owner in OWNERS},
            available_bytes=usage["available"],
            backed_bytes=usage["backed_free"],
            physical_bytes=usage["physical"],
            peaks={k.removeprefix("peak_"): v for k, v in usage.items() if k.startswith("peak_")},
            host_limit_bytes=host["limit"] if host else 0,
            host_used_bytes=host["used"] if host else 0,
        )

    def by_owner(self) -> dict[str, int]:
        """Bytes of each owner; they add up to `limit_bytes`."""
        return {owner: int(getattr(self, f"{owner}_bytes")) for owner in OWNERS}

    def __str__(self) -> str:
        """A small table with bars."""
        lines = [f"limit       {format_bytes(self.limit_bytes):>12}"]
        for owner, count in self.by_owner().items():
            bar = "#" * round(40 * count / max(1, self.limit_bytes))
            lines.append(f"{owner:<11} {format_bytes(count):>12} {bar}")
        if self.host_limit_bytes:
            used = format_bytes(self.host_used_bytes)
            lines.append(f"host        {used:>12} of {format_bytes(self.host_limit_bytes)}")
        return "\n".join(lines)
