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

    @staticmethod
    def simulated(chunk_bytes: int, limit_bytes: int) -> Pool:
        """A pool whose driver keeps books but has no memory: its addresses must not be touched.

        A broken rule of the driver (such as mapping over a mapping) ends the process.
        """

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

    def cache(self, ids: Sequence[int]) -> None:
        """The prefix cache takes one reference to each chunk, or to none.

        A chunk that an active slot maps belongs to "kv" even so; when the last such slot lets go it
        belongs to "cache". Raises `ValueError` for chunks in no active slot or cached already.
        """

    def uncache(self, ids: Sequence[int]) -> int:
        """The prefix cache gives the chunks up, all or none.

        Returns the bytes that became free, or available where a dying slot still maps them.
        """

    def trim(self, keep_bytes: int = 0) -> int:
        """Hands backed free memory beyond `keep_bytes` to the system; returns the bytes."""

    def resize(self, limit_bytes: int) -> None:
        """Sets the limit. Raises `OutOfMemory` below what is owned or available."""

    def inject_faults(self, seed: int, rate: float) -> None:
        """Simulated pools: each driver call fails with probability `rate`; 0 ends it.

        Drawn by splitmix64 from the seed, call by call. A KV cache's thread makes calls too: a run
        repeats exactly if `KvCache.settle` follows each `premap` and `release_async`.
        """

    def fail_call(self, n: int) -> None:
        """Simulated pools: the n-th driver call from now fails; the next one is 1."""

    @property
    def driver_calls(self) -> int:
        """Simulated pools: driver calls so far, failed ones included."""

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

    The cache has a thread of its own for `premap` and `release_async`. Calls that need a slot with
    work pending there wait for that slot alone.
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

    def take_empty_slot(self) -> int:
        """A slot with nothing mapped; unmaps the smallest available one where none is free.

        Raises `OutOfMemory` when every slot is in use.
        """

    def extend(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Maps until `slots[i]` holds `tokens[i]` tokens, for all i or for none.

        Where the pool is short, available slots are unmapped first.
        """

    def premap(self, slots: Sequence[int], tokens: Sequence[int]) -> int:
        """Takes, now, the chunks that `extend` with the same arguments would, and returns how many.

        In order, as far as they can be had without reclaiming or waiting. They count as "kv" now
        and are mapped on the cache's thread. `extend` waits for that and maps what is missing then,
        which includes what failed here.
        """

    def map_shared(self, slot: int, ids: Sequence[int]) -> None:
        """Maps these chunks as the first ones of an active slot with nothing mapped.

        All or nothing, with one more reference to each. They have to be cached or in an active
        slot.
        """

    def slot_chunks(self, slot: int, begin: int, end: int) -> list[int]:
        """Ids of the mapped chunks [begin, end) of a slot, in order of their tokens."""

    def truncate(self, slot: int, tokens: int) -> None:
        """Unmaps what `tokens` tokens do not need."""

    def release(self, slot: int) -> None:
        """Ends a request; its slot stays mapped ("available") until the memory is needed.

        A broken slot is repaired. The slot no longer belongs to the request even if this raises.
        """

    def release_async(self, slot: int) -> None:
        """As `release`, but what has to be unmapped is unmapped on the cache's thread.

        The slot is "dying" until then and cannot be taken. The accounting is at once: chunks that
        nobody else holds count as available, cached ones as "cache". Whoever is short of memory or
        slots waits for it. Where unmapping fails, the slot is "broken".
        """

    def settle(self) -> None:
        """Waits until the cache's thread has nothing left to do."""

    def reclaim(self, bytes: int) -> int:
        """Unmaps available slots, the largest first, until `bytes` are back in the pool.

        Returns the bytes given back, which may be fewer. Dying slots are waited for and count.
        """

    def trim_available(self) -> int:
        """Unmaps all available slots; returns the bytes given back to the pool."""

    def mapped_tokens(self, slot: int) -> int:
        """Tokens that fit what is mapped; 0 for a broken slot."""

    def mapped_bytes(self, slot: int) -> int: ...
    def slot_state(self, slot: int) -> str:
        """One of "free", "active", "available", "dying", "broken"."""

    def stats(self) -> dict[str, int]:
        """Slots and mapped bytes by state, driver calls and the time in them.

        "active_bytes", "available_bytes", "dying_bytes", "broken_bytes", "active_slots",
        "available_slots", "free_slots", "dying_slots", "broken_slots", "map_calls", "map_us",
        "unmap_calls", "unmap_us". "dying_bytes" are those that nobody but dying slots holds.
        """

    def close(self) -> None:
        """Unmaps everything and gives the addresses back; may be repeated."""

def ffi_registrations() -> dict[str, object]:
    """FFI target name -> capsule of its handler."""

def cpu_isa() -> str:
    """The instruction set of the kernels in use: "avx512", "avx2" or "generic"."""

def malloc_trim() -> bool:
    """Gives unused heap back to the system; True if any went."""

def malloc_retain(bytes: int) -> None:
    """Sets how large a piece of heap may be to be kept when it is freed, at most 32 MiB; larger
    ones go back to the system at once."""

class HostBuffer:
    """The host tier's memory: blocks of one size under a limit. Thread-safe.

    A block gets its memory when it is first taken, and keeps it when it is given back.
    """

    def __init__(self, block_bytes: int, limit_bytes: int) -> None:
        """`block_bytes` is whole pages; `limit_bytes` may be anything."""

    @property
    def block_bytes(self) -> int: ...
    def take(self, n: int) -> list[int]:
        """`n` blocks, contents undefined, or `OutOfMemory` and none."""

    def give_back(self, blocks: Sequence[int]) -> None:
        """Gives blocks back, all or none.

        Raises `ValueError` where one is nobody's, named twice, or being copied.
        """

    def address(self, block: int) -> int:
        """Where a taken block starts, until it is given back."""

    def usage(self) -> dict[str, int]:
        """One consistent picture, in bytes: "limit" == "used" + "free".

        "peak_used": the highest "used" so far. "physical": what is taken from the system, at most
        "limit".
        """

    def resize(self, limit_bytes: int) -> None:
        """Sets the limit. Raises `OutOfMemory` below what is used."""

    def trim(self) -> int:
        """Gives the memory of blocks that nobody has to the system; returns the bytes."""

class Copier:
    """Copies between the slots of a KV cache and host blocks, one after the other, in a thread.

    Until a copy is done its chunks stay mapped, and unchanged (offload) or untouched (fetch): the
    caller sees to that. Its blocks cannot be given back.
    """

    def __init__(self) -> None: ...
    def offload(
        self, kv: KvCache, slot: int, first_tile: int, buffer: HostBuffer, blocks: Sequence[int]
    ) -> int:
        """Copies chunks [first_tile, first_tile + len(blocks)) of the slot to the blocks.

        Returns a ticket. `ValueError`: no such slot, tiles or blocks, blocks of another size than
        the chunks, a simulated pool, or a closed copier.
        """

    def fetch(
        self, kv: KvCache, slot: int, first_tile: int, buffer: HostBuffer, blocks: Sequence[int]
    ) -> int:
        """The reverse of `offload`."""

    def done(self, ticket: int) -> bool:
        """Whether the copy is over, well or not."""

    def wait(self, ticket: int) -> None:
        """Returns when the copy is over.

        Raises `RuntimeError` if it failed: a chunk was not mapped when its turn came, or the
        copier was closed first. Some chunks or blocks may have been copied even so.
        """

    def stats(self) -> dict[str, int]:
        """Of copies so far: "offload_" and "fetch_" + "bytes", "us" and "calls"."""

    def close(self) -> None:
        """Ends the thread. Copies that are not done have failed; may be repeated."""

class Arena:
    """Workspaces in one reserved range over a pool, counted as its activations. Thread-safe.

    Segments are whole chunks, best fit with coalescing. Freed ones stay mapped ("inactive") for
    the next.
    """

    def __init__(self, pool: Pool, reserved_bytes: int) -> None:
        """Reserves addresses, rounded up to chunks; maps nothing."""

    def allocate(self, bytes: int) -> int:
        """The address of a segment, contents undefined.

        Raises `OutOfMemory` where neither the pool nor inactive chunks of the arena suffice, or no
        free segment is long enough.
        """

    def free(self, address: int) -> None:
        """Ends a segment, which stays mapped."""

    def collect(self, bytes: int) -> int:
        """Unmaps inactive chunks until `bytes` are back in the pool.

        Returns the bytes given back, which may be fewer.
        """

    def serve(self, kv: KvCache) -> None:
        """The kernels of this KV cache take their workspaces here until it is closed.

        Where the arena is short they use the heap.
        """

    def usage(self) -> dict[str, int]:
        """One consistent picture, in bytes.

        "mapped" == "live" (in segments) + "inactive"; "reserved": addresses.
        """
