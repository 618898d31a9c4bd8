"""The native library: virtual tensors, KV slots and CPU kernels.

Errors: `ValueError` for arguments that make no sense, `OutOfMemory` where a limit stands in the
way, `RuntimeError` where the system refused. Unless a slot is "broken" afterwards, a call that
raises has changed nothing.
"""

from collections.abc import Sequence

class OutOfMemory(RuntimeError):
    """A limit stands in the way; waiting or freeing helps."""

class Pool:
    """Physical memory under one limit, counted by owner to the byte. Thread-safe.

    Owners are "kv", "cache", "activation", "weights" and "workspace".
    """

    def __init__(self, chunk_bytes: int, limit_bytes: int) -> None:
        """`chunk_bytes` is a power of two of whole pages; `limit_bytes` may be anything."""

    @property
    def chunk_bytes(self) -> int: ...
    def usage(self) -> dict[str, int]:
        """One consistent picture, in bytes.

        "limit" == "free" + "kv" + "cache" + "activation" + "weights" + "workspace".
        "available": the part of "free" that is still mapped in dead slots.
        "backed_free": the part of "free" whose physical memory is kept.
        "obtainable": "free" - "available", what `reserve` gets now.
        "physical": what the pool counts as taken from the system; at most "limit".
        "peak_" + owner, "peak_available", "peak_used" (all owners), "peak_physical".
        "create_calls", "create_us", "destroy_calls", "destroy_us": driver calls and time in them.
        """

    def reset_peaks(self) -> None:
        """Starts the peak_* values of `usage` anew, from what is owned now."""

    def reserve(self, owner: str, bytes: int) -> None:
        """Counts bytes that are allocated elsewhere, or raises `OutOfMemory`."""

    def give_back(self, owner: str, bytes: int) -> None:
        """Undoes `reserve`, in any portions."""

    def trim(self, keep_bytes: int = 0) -> int:
        """Hands backed free memory beyond `keep_bytes` to the system; returns the bytes."""

    def resize(self, limit_bytes: int) -> None:
        """Sets the limit. Raises `OutOfMemory` below what is owned or available."""

class KvLayout:
    """Where the K and V of a token lie."""

    @staticmethod
    def choose(
        layers: int,
        kv_heads: int,
        head_dim: int,
        element_bytes: int,
        max_tokens: int,
        num_slots: int,
    ) -> KvLayout:
        """The layout that wastes least. Raises `ValueError` for sizes that cannot be."""

    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def element_bytes(self) -> int: ...
    @property
    def tile_tokens(self) -> int:
        """Tokens per chunk."""

    @property
    def chunk_bytes(self) -> int: ...
    @property
    def slot_bytes(self) -> int:
        """Addresses per slot."""

    @property
    def num_slots(self) -> int: ...
    @property
    def max_tokens(self) -> int:
        """Tokens per slot."""

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers."""

    @property
    def reserved_bytes(self) -> int:
        """Addresses of all slots."""

    def chunks_for(self, tokens: int) -> int:
        """Chunks that `tokens` tokens of one slot take."""

class KvCache:
    """The slots of a model over a pool.

    The methods that change something belong to one thread at a time (a second one gets a
    `ValueError`); the others may be called from any thread. No step may be in flight that touches
    memory being unmapped.
    """

    def __init__(self, pool: Pool, layout: KvLayout) -> None:
        """Reserves addresses for every slot; maps nothing."""

    @property
    def id(self) -> int:
        """Its number in the registry, for custom calls. Never used twice in a process."""

    @property
    def layout(self) -> KvLayout: ...
    def take_slot(self, tokens: int) -> int:
        """A slot for about `tokens` tokens: the best fit among the mapped ones. Maps nothing.

        Raises `OutOfMemory` when every slot is in use.
        """

    def extend(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Maps until `slots[i]` holds `tokens[i]` tokens, for all i or for none.

        Where the pool is short, available slots are unmapped first.
        """

    def truncate(self, slot: int, tokens: int) -> None:
        """Unmaps what `tokens` tokens do not need."""

    def release(self, slot: int) -> None:
        """Ends a request; its slot stays mapped ("available") until the memory is needed.

        A broken slot is repaired. The slot no longer belongs to the request even if this raises.
        """

    def reclaim(self, bytes: int) -> int:
        """Unmaps available slots, the largest first, until `bytes` are back in the pool.

        Returns the bytes given back, which may be fewer.
        """

    def trim_available(self) -> int:
        """Unmaps all available slots; returns the bytes given back to the pool."""

    def mapped_tokens(self, slot: int) -> int:
        """Tokens that fit what is mapped; 0 for a broken slot."""

    def mapped_bytes(self, slot: int) -> int: ...
    def slot_state(self, slot: int) -> str:
        """One of "free", "active", "available", "broken"."""

    def stats(self) -> dict[str, int]:
        """Slots and mapped bytes by state, driver calls and the time in them.

        "active_bytes", "available_bytes", "broken_bytes", "active_slots", "available_slots",
        "free_slots", "broken_slots", "map_calls", "map_us", "unmap_calls", "unmap_us".
        """

    def close(self) -> None:
        """Unmaps everything and gives the addresses back; may be repeated."""

def ffi_registrations() -> dict[str, object]:
    """FFI target name -> capsule of its handler."""

def cpu_isa() -> str:
    """The instruction set of the kernels in use: "avx512", "avx2" or "generic"."""

def malloc_trim() -> bool:
    """Gives unused heap back to the system; True if any went."""
