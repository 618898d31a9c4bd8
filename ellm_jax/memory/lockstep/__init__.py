"""The memory of several devices, driven as if it were that of one.

With tensor parallelism every device holds its heads of the same tokens, so all of them hold the
same slots, chunk for chunk, and whoever plans sees one pool. Each class here has the methods of a
native one and drives a member per device. What is refused on one device is undone on the others.
Members may differ for a while in what nobody owns (slots that are still being unmapped, memory that
is kept for later); figures are those of the device that has least.
"""

from typing import TypeAlias

from ellm_jax._native import Arena, KvCache, Pool
from ellm_jax.memory.lockstep.kv import LockstepKv
from ellm_jax.memory.lockstep.pool import LockstepPool
from ellm_jax.memory.lockstep.tiers import LockstepArena, LockstepBuffer, LockstepCopier

__all__ = [
    "AnyArena",
    "AnyKv",
    "AnyPool",
    "LockstepArena",
    "LockstepBuffer",
    "LockstepCopier",
    "LockstepKv",
    "LockstepPool",
]

AnyPool: TypeAlias = "Pool | LockstepPool"
"""Of one device, or of several."""
AnyKv: TypeAlias = "KvCache | LockstepKv"
"""Likewise."""
AnyArena: TypeAlias = "Arena | LockstepArena"
"""Likewise."""
