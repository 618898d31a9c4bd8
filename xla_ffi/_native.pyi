"""The native library: virtual tensors, KV slots and CPU kernels.

Errors: `ValueError` for arguments that make no sense, `OutOfMemory` where a limit stands in the
way, `RuntimeError` where the system refused. Unless a slot is "broken" afterwards, a call that
raises has changed nothing.

Devices are named "cpu", "cuda:0", "cuda:1" and so on. The CUDA driver is looked for when a CUDA
device is first asked for; where there is none, that raises RuntimeError and says why.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

class OutOfMemory(RuntimeError):
    """A limit stands in the way; waiting or freeing helps."""

class Pool:
    """Physical memory under one limit, counted by owner to the byte. Thread-safe.

    Owners are "kv", "cache", "activation", "weights" and "workspace".
    """

    def __init__(self, chunk_bytes: int, limit_bytes: int, device: str = "cpu") -> None:
        """`chunk_bytes` is a power of two and a multiple of `granularity_bytes(device)`;
        `limit_bytes` may be anything.

        On a CUDA device the primary context is used, which is JAX's too: initialise JAX first.
        """

    @staticmethod
    def simulated(chunk_bytes: int, limit_bytes: int) -> Pool:
        """A pool whose driver keeps books but has no memory: its addresses must not be touched.

        A broken rule of the driver (such as mapping over a mapping) ends the process.
        """

    @property
    def chunk_bytes(self) -> int: ...
    @property
    def device(self) -> str:
        """The device, or "simulated"."""

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

    def back_ahead(self, bytes: int) -> None:
        """Has up to `bytes` of free memory made by a thread of the pool's own, now and whenever
        chunks were taken, so that nobody waits for it to be made. 0 ends it.

        What is made ahead is "backed_free" and counts as free; the limit holds at every moment.
        Once backed memory was handed back (`trim`, `resize`, `reserve` that needed the room), or
        the system refused, nothing is made until chunks are taken again.
        """

    def synchronize(self) -> None:
        """Waits until the device has done everything that was started on it; nothing on a CPU.

        Memory of slots that a failed step may still touch is not to be given up before. Raises
        RuntimeError where some of what was started has failed.
        """

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
        granularity_bytes: int = 4096,
        scale_bytes: int = 0,
    ) -> KvLayout:
        """The layout that wastes least, in chunks of at least `granularity_bytes`, the device's
        (see `granularity_bytes()`). With `scale_bytes=4`, elements are int8 (`element_bytes=1`) and
        each row of `head_dim` has a float32 scale. Raises `ValueError` for sizes that cannot be."""

    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def element_bytes(self) -> int: ...
    @property
    def scale_bytes(self) -> int:
        """Of a row of elements; 0: none."""

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
        """K and V of one token in all layers, scales included."""

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

    def take(self, slot: int) -> None:
        """That very slot, with what is mapped in it: for several caches that are to give a request
        the same one.

        Waits for what is pending in the slot. Raises `OutOfMemory` when it is in use.
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

    def check_step(self, metadata: npt.NDArray[np.int32]) -> None:
        """Checks that all that a step reads and writes is mapped, from the metadata of the step
        (`StepLayout.pack`) on the host; for devices where the custom calls cannot look.

        Raises `RuntimeError` with slot, tokens and what is mapped where it is not, `ValueError`
        where the metadata makes no sense.
        """

    def stats(self) -> dict[str, int]:
        """Slots and mapped bytes by state, driver calls and the time in them.

        "active_bytes", "available_bytes", "dying_bytes", "broken_bytes", "active_slots",
        "available_slots", "free_slots", "dying_slots", "broken_slots", "map_calls", "map_us",
        "unmap_calls", "unmap_us". "dying_bytes" are those that nobody but dying slots holds.
        """

    def close(self) -> None:
        """Unmaps everything and gives the addresses back; may be repeated.

        On a CUDA device it waits for everything that runs there first. Raises `RuntimeError`, and
        unmaps nothing, where that fails.
        """

class KvGroup:
    """One number for the KV caches of several devices, by which a program that runs on all of them
    names them: a handler finds the cache of its own device. Lasts as long as the object."""

    def __init__(self, caches: Sequence[KvCache], device_ordinals: Sequence[int]) -> None:
        """`device_ordinals[i]` is the device of `caches[i]` as XLA counts them on this host.
        Raises `ValueError` where a cache is on another CUDA device than that."""

    @property
    def id(self) -> int:
        """Its number in the registry, for custom calls. Never used twice in a process."""

def ffi_registrations() -> dict[str, object]:
    """FFI target name -> capsule of its handler."""

def cuda_ffi_registrations() -> dict[str, object]:
    """FFI target name -> capsule of its handler on CUDA; empty in a build without CUDA."""

def cuda_attention_workspace_bytes(
    dtype: str,
    rows: int,
    sequences: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    max_tokens: int,
) -> int:
    """Bytes of the workspace of an attention call on CUDA; in any build.

    `dtype`: "float32", "bfloat16" or "float16"; `rows`: T; `sequences`: most of the step;
    `max_tokens`: of a slot. `ValueError`: another dtype, or sizes that make no sense.
    """

def load_cuda_attention(
    device: int,
    dtype: str,
    rows: int,
    sequences: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    max_tokens: int,
) -> None:
    """Makes the kernels of such calls ready on a device, which cannot be done while a CUDA graph is
    captured.

    `RuntimeError`: CUDA refused, or this build has no CUDA kernels. `ValueError`: sizes that make
    no sense, or that the kernels do not take.
    """

def pack_panels(matrix: npt.NDArray[np.uint32], by_turns: bool = False) -> None:
    """Puts a matrix, `[N, words]` with two bfloat16 or four int8 to a word, into panels, in its
    place; `Format` says how they lie. With `by_turns` its first half, the gates, and its second,
    the ups, take turns before; N has to be a multiple of 64 (`ValueError`)."""

def int8_panels() -> bool:
    """Whether int8 weights are multiplied in panels on this processor."""

def quantize_int8(
    x: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    values: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
) -> None:
    """Rows of numbers to int8 values in [-127, 127] and a float32 scale each: `scale = max |x| /
    127`, `value = x / scale` to the nearest, ties to even.

    A row below 1e-30 all over becomes zeros with the scale 0; one with a NaN or an infinity, zeros
    with the scale NaN.

    Args:
        x: `[N, K]`, row-major; uint16 is the bits of bfloat16.
        values: `[N, K]`, written.
        scales: `[N]`, written.
    """

def quantize_int4(
    x: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    values: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint16],
) -> None:
    """Rows of numbers to steps from 0 to 15 and a float16 scale for each group of inputs: a number
    is about `scale * (step - 8)`.

    Of several scales around the extreme of a group over -8, the one with the least squared error
    is taken. A group below 1e-6 all over gets the scale 0; one with a NaN, an infinity or a number
    from 4e5 on, the scale NaN.

    Args:
        x: `[N, K]`, row-major; uint16 is the bits of bfloat16.
        values: `[N / 16, K / group, 8 group]`, rounded up, group 32 or 128, written: two steps to a
            byte. Byte 4 c + b of the 64 for inputs i to i + 7 holds, of output c of the panel, that
            of input i + b in its low half and that of i + 4 + b in its high half.
        scales: `[N / 16, K / group, 16]`, the bits of float16, written.
    """

def pack_int4(steps: npt.NDArray[np.uint8], values: npt.NDArray[np.uint8]) -> None:
    """Steps from 0 to 15, `[N, K]`, to where `quantize_int4` puts them. What fills up is 8."""

def int8_isa() -> str:
    """The instruction set of the int8 and int4 kernels in use."""

def cpu_isa() -> str:
    """The instruction set of the kernels in use: "avx512", "avx2" or "generic"."""

def cuda_devices() -> list[dict[str, Any]]:
    """The CUDA devices by ordinal: "name", "total_bytes", "free_bytes" (now, for all processes; 0
    where the device has no room for this one), "compute_capability" (major, minor). [] where there
    is no CUDA driver; see `cuda_error`.

    Makes the context of each device for as long as it takes to ask what is free.
    """

def cuda_error() -> str | None:
    """Why CUDA cannot be used here, and what to do; None where it can."""

def granularity_bytes(device: str) -> int:
    """The smallest chunk of a device's memory: a page, or 2 MiB on CUDA devices."""

def time_mapping(device: str, chunk_bytes: int, count: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds per chunk of each call that mapping consists of, one value per repeat.

    `count` chunks are created ("create"), mapped and unmapped one by one ("map", "unmap"), then
    together ("map_batched", "unmap_batched"), and destroyed ("destroy"). On CUDA devices mapping
    and access are separate calls ("set_access", "set_access_batched").
    """

def malloc_trim() -> bool:
    """Gives unused heap back to the system; True if any went."""

def malloc_retain(bytes: int) -> None:
    """Sets how large a piece of heap may be to be kept when it is freed, at most 32 MiB; larger
    ones go back to the system at once."""

class HostBuffer:
    """The host tier's memory: blocks of one size under a limit. Thread-safe.

    A block gets its memory when it is first taken, and keeps it when it is given back.
    """

    def __init__(self, block_bytes: int, limit_bytes: int, device: str = "cpu") -> None:
        """`block_bytes` is whole pages; `limit_bytes` may be anything. For a CUDA `device` blocks
        are pinned (page-locked), for all CUDA devices."""

    @property
    def block_bytes(self) -> int: ...
    @property
    def device(self) -> str:
        """The device that it is host memory for."""

    def prepare(self, bytes: int) -> None:
        """Makes, and pins, the memory of as many blocks as `bytes` (or the limit) hold, so that
        `take` need not. Between two blocks whoever waits goes first."""

    def prepare_ahead(self, bytes: int) -> None:
        """Has the same done by a thread of the buffer's own, until it is done, the system refuses
        or `trim` gives memory back. Replaces what was asked before; 0 ends it."""

    def close(self) -> None:
        """Ends what `prepare_ahead` has begun, after the block that it is at. The blocks stay."""

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
    """Copies between the slots of a KV cache and host blocks, in the order of submission.

    On a CPU one thread does them one after the other. On a CUDA device each direction has a thread
    and a stream of its own, beside XLA's: the order holds within a direction, and between copies
    that share a block. Several chunks are under way at once.

    Until a copy is done its chunks stay mapped, and unchanged (offload) or untouched (fetch): the
    caller sees to that. Its blocks cannot be given back.
    """

    def __init__(self, device: str = "cpu") -> None:
        """KV caches and host buffers have to be of the same device."""

    def offload(
        self, kv: KvCache, slot: int, first_tile: int, buffer: HostBuffer, blocks: Sequence[int]
    ) -> int:
        """Copies chunks [first_tile, first_tile + len(blocks)) of the slot to the blocks.

        Returns a ticket. `ValueError`: no such slot, tiles or blocks, blocks of another size than
        the chunks, a simulated pool, another device, or a closed copier.
        """

    def fetch(
        self, kv: KvCache, slot: int, first_tile: int, buffer: HostBuffer, blocks: Sequence[int]
    ) -> int:
        """The reverse of `offload`."""

    def done(self, ticket: int) -> bool:
        """Whether the copy is over, well or not."""

    def wait(self, ticket: int) -> None:
        """Returns when the copy is over.

        Raises `RuntimeError` if it failed: a chunk was not mapped when its turn came, the device
        failed, or the copier was closed first. Some chunks or blocks may have been copied even so.
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

        Where the arena is short they use the heap. For pools on the CPU.
        """

    def usage(self) -> dict[str, int]:
        """One consistent picture, in bytes.

        "mapped" == "live" (in segments) + "inactive"; "reserved": addresses.
        """
