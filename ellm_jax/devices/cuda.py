"""An NVIDIA GPU: memory by CUDA's virtual memory management, activations from its memory pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ellm_jax._native import (
    Arena,
    Copier,
    HostBuffer,
    KvCache,
    KvLayout,
    Pool,
    granularity_bytes,
)
from ellm_jax.devices.allocator import check_allocator, prepare_environment
from ellm_jax.devices.errors import DeviceError
from ellm_jax.memory.balloon import Balloon, DeviceBalloon
from ellm_jax.memory.device_pool import DevicePool
from ellm_jax.memory.kv_format import KvFormat
from ellm_jax.memory.system import MARGIN
from ellm_jax.models.config import ModelConfig
from ellm_jax.models.shards import WHOLE
from ellm_jax.runtime import cuda_ops
from ellm_jax.runtime.backend import Backend
from ellm_jax.runtime.shapes import StepShape

_AHEAD_BYTES = 1 << 30
"""Most of the free memory that is kept in chunks which are made already. A prompt of 8K tokens of
an 8B model takes as much; making it takes some 30 us per 2 MiB, for which no step should wait."""
_LEAST_AHEAD_BYTES = 128 << 20
_AHEAD_SHARE = 16
"""Between the two it is this part of the limit."""
_ROUNDING_BYTES = 64 << 20
"""What CUDA's memory pool may hold beside what XLA asks it for: it takes memory from the device in
pieces of up to 32 MiB. A bound that has to be proven on a GPU; `scripts/gpu_check` does."""


class CudaDevice:
    """See `Device`.

    Attributes:
        ordinal: its number among those that the process may use.
        memory: its memory pool.
    """

    platform = "cuda"
    shards = WHOLE
    rounding_bytes = _ROUNDING_BYTES

    def __init__(self, device: jax.Device, memory: DevicePool):
        """Takes the device as JAX knows it, and its memory pool."""
        self.jax_device = device
        self.ordinal = memory.ordinal
        self.memory = memory
        self._placement = None
        if device != jax.devices()[0]:
            self._placement = jax.sharding.SingleDeviceSharding(device)

    @property
    def _name(self) -> str:
        return f"cuda:{self.ordinal}"

    def default_limit_bytes(self) -> int:
        """What the device has free, less a tenth for what CUDA and its libraries take: contexts,
        compiled code, graphs, and workspaces that are not XLA's."""
        # What earlier engines have left in the pool is free too.
        self.memory.synchronize()
        self.memory.trim(0)
        free_bytes, _ = self.memory.memory_info()
        return int(free_bytes * (1 - MARGIN))

    def choose_layout(
        self, config: ModelConfig, held: KvFormat, max_tokens: int, num_slots: int
    ) -> KvLayout:
        """Chunks of what the device maps at once, 2 MiB on those of today, or more."""
        return KvLayout.choose(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            held.element_bytes,
            max_tokens,
            num_slots,
            granularity_bytes=granularity_bytes(self._name),
            scale_bytes=held.scale_bytes,
        )

    def make_pool(self, chunk_bytes: int, limit_bytes: int) -> Pool:
        """Memory of the device. Some of it is made into chunks ahead, so that no step waits for the
        driver to do so."""
        pool = Pool(chunk_bytes, limit_bytes, device=self._name)
        share_bytes = limit_bytes // _AHEAD_SHARE
        pool.back_ahead(min(_AHEAD_BYTES, max(_LEAST_AHEAD_BYTES, share_bytes)))
        return pool

    def make_kv(self, pool: Pool, layout: KvLayout) -> KvCache:
        """Slots over it."""
        return KvCache(pool, layout)

    def make_arena(self, pool: Pool, kv: KvCache) -> Arena | None:
        """None: the kernels get their workspaces from XLA, as part of what activations hold."""
        return None

    def make_host_buffer(self, block_bytes: int, limit_bytes: int) -> HostBuffer:
        """Pinned memory of the host. Pinning takes long, so it is done beside everything else."""
        buffer = HostBuffer(block_bytes, limit_bytes, device=self._name)
        buffer.prepare_ahead(limit_bytes)
        return buffer

    def make_copier(self) -> Copier:
        """Copies on streams of their own."""
        return Copier(device=self._name)

    def make_backend(self, kv_id: int, kv: KvCache) -> Backend:
        """Attention by our kernels, all else by XLA. What a step touches is checked before it is
        dispatched: on the device nobody could refuse it."""
        cuda_ops.register()
        layout = kv.layout
        return Backend(
            make_ops=partial(cuda_ops.CudaOps, kv_id=kv_id, max_tokens=layout.max_tokens),
            # The kernels' workspaces are results of their calls, so XLA states them.
            extra_bytes=lambda config, shape: 0,
            placement=self._placement,
            host_skips=True,
            check=partial(cuda_ops.check_step, kv),
            prepare=partial(self._load_kernels, layout),
            compiler_options=cuda_ops.COMPILER_OPTIONS,
        )

    def _load_kernels(self, layout: KvLayout, config: ModelConfig, shape: StepShape) -> None:
        """Has the kernels of a shape on the device before XLA captures a graph with them."""
        cuda_ops.load_kernels(
            [self.ordinal],
            np.float32 if layout.element_bytes == 4 else jnp.bfloat16,
            rows=shape.rows,
            sequences=shape.seqs,
            # The layout has the heads of this device, the model those of all.
            q_heads=layout.kv_heads * (config.num_heads // config.num_kv_heads),
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            max_tokens=layout.max_tokens,
        )

    def make_balloon(self, settle: Callable[[], object]) -> Balloon:
        """The device's memory pool."""
        return DeviceBalloon(self.memory, settle)


def open_cuda(count: int) -> list[CudaDevice]:
    """The first GPUs that JAX has, with XLA's allocator as the engine needs it.

    Raises:
        DeviceError: JAX cannot use them, has fewer, or has another allocator.
    """
    prepare_environment()
    try:
        devices = jax.devices("cuda")
    except RuntimeError as error:
        raise DeviceError(
            f"device='cuda': JAX cannot use the GPU: {error}; see whether "
            "python -c 'import jax; jax.devices(\"cuda\")' works, or use device='cpu'"
        ) from error
    if len(devices) < count:
        raise DeviceError(
            f"{count} GPUs were asked for, and JAX has {len(devices)}; ask for fewer, or see "
            "CUDA_VISIBLE_DEVICES"
        )
    opened = []
    for device in devices[:count]:
        memory = DevicePool(device.local_hardware_id)
        check_allocator(memory, device)
        opened.append(CudaDevice(device, memory))
    return opened
