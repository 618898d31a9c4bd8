"""The CPU: memory from memfd, steps by the native kernels, activations from the heap."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax

from ellm_jax._native import (
    Arena,
    Copier,
    HostBuffer,
    KvCache,
    KvLayout,
    Pool,
    malloc_retain,
    malloc_trim,
)
from ellm_jax.devices.allocator import ENVIRONMENT
from ellm_jax.devices.errors import DeviceError
from ellm_jax.devices.native import has_cuda_kernels
from ellm_jax.devices.threads import start_pool
from ellm_jax.memory.balloon import Balloon, HeapBalloon
from ellm_jax.memory.kv_format import KvFormat
from ellm_jax.memory.system import default_limit_bytes
from ellm_jax.models.config import ModelConfig
from ellm_jax.models.shards import WHOLE
from ellm_jax.runtime.backend import Backend, native_backend

_RETAINED_BYTES = 16 << 20
"""What XLA's allocator on the CPU, the heap, keeps of a step's memory for the next one. Enough for
decoding; what prefilling takes beyond it goes back when the step ends, which costs a page fault per
4 KiB, under a thousandth of such a step."""
_ARENA_BYTES = 1 << 30
"""Addresses for the kernels' workspaces; memory is mapped as far as they use it."""


class CpuDevice:
    """See `Device`."""

    platform = "cpu"
    shards = WHOLE
    rounding_bytes = 0

    def __init__(self, device: jax.Device):
        """Takes the device as JAX knows it, and tells the heap what to keep."""
        malloc_retain(_RETAINED_BYTES)
        self.jax_device = device
        # Where JAX prefers another device, arrays have to be told to stay here.
        self._placement = None
        if device != jax.devices()[0]:
            self._placement = jax.sharding.SingleDeviceSharding(device)

    def default_limit_bytes(self) -> int:
        """What the machine has free, less a tenth."""
        return default_limit_bytes()

    def choose_layout(
        self, config: ModelConfig, held: KvFormat, max_tokens: int, num_slots: int
    ) -> KvLayout:
        """Chunks of 64 KiB to 2 MiB."""
        return KvLayout.choose(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            held.element_bytes,
            max_tokens,
            num_slots,
            scale_bytes=held.scale_bytes,
        )

    def make_pool(self, chunk_bytes: int, limit_bytes: int) -> Pool:
        """Memory of the machine."""
        return Pool(chunk_bytes, limit_bytes)

    def make_kv(self, pool: Pool, layout: KvLayout) -> KvCache:
        """Slots over it."""
        return KvCache(pool, layout)

    def make_arena(self, pool: Pool, kv: KvCache) -> Arena | None:
        """Workspaces in the pool."""
        arena = Arena(pool, _ARENA_BYTES)
        arena.serve(kv)
        return arena

    def make_host_buffer(self, block_bytes: int, limit_bytes: int) -> HostBuffer:
        """More of the same memory, under a limit of its own."""
        return HostBuffer(block_bytes, limit_bytes)

    def make_copier(self) -> Copier:
        """Copies on a thread."""
        return Copier()

    def make_backend(self, kv_id: int, kv: KvCache) -> Backend:
        """The native kernels. They find the cache by the metadata of a step, and check it."""
        return native_backend(self._placement)

    def make_balloon(self, settle: Callable[[], object]) -> Balloon:
        """The heap."""
        return HeapBalloon(_RETAINED_BYTES, malloc_trim)


def open_cpu(count: int, threads: int | None = None) -> list[CpuDevice]:
    """The CPU, or several devices that JAX makes of it. `threads` as of `start_pool`.

    Raises:
        DeviceError: JAX makes fewer of it, or has another number of threads already.
    """
    if has_cuda_kernels():
        # JAX initialises every platform it has. Where GPUs are among them, they get the allocator
        # that an engine on a GPU needs, so that one may follow; unless somebody wants another.
        for name, wanted in ENVIRONMENT.items():
            os.environ.setdefault(name, wanted)
    start_pool(threads)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise DeviceError(
            f"{count} devices were asked for, and JAX makes {len(devices)} of the CPU; ask for "
            f"fewer, or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return [CpuDevice(device) for device in devices[:count]]
