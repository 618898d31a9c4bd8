"""Several devices that share a model, as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

from ellm_jax._native import Arena, Copier, HostBuffer, KvLayout, Pool
from ellm_jax.devices.device import Device
from ellm_jax.memory.balloon import Balloon
from ellm_jax.memory.kv_format import KvFormat
from ellm_jax.memory.lockstep import (
    LockstepArena,
    LockstepBuffer,
    LockstepCopier,
    LockstepKv,
    LockstepPool,
)
from ellm_jax.models.collectives import device_mesh, on_each
from ellm_jax.models.config import ModelConfig
from ellm_jax.models.shards import Shards
from ellm_jax.runtime.backend import Backend
from ellm_jax.runtime.shapes import StepShape


class DeviceGroup:
    """See `Device`: each part drives one of every device, in lockstep. Sizes are those of one.

    On the CPU the model is divided so that answers are, bit for bit, those of one device. On GPUs,
    whose libraries add in an order of their own anyway, with half as many exchanges.
    """

    def __init__(self, devices: Sequence[Device]):
        """Takes single devices of one kind."""
        self._devices = tuple(devices)
        self.platform = devices[0].platform
        self.jax_device = devices[0].jax_device
        self.rounding_bytes = max(device.rounding_bytes for device in devices)
        self.shards = Shards(len(devices), exact=self.platform == "cpu")

    def default_limit_bytes(self) -> int:
        """What every device has. Devices that JAX makes of one CPU share its memory."""
        least = min(device.default_limit_bytes() for device in self._devices)
        return least // len(self._devices) if self.platform == "cpu" else least

    def choose_layout(
        self, config: ModelConfig, held: KvFormat, max_tokens: int, num_slots: int
    ) -> KvLayout:
        """That of one device's heads."""
        count = len(self._devices)
        own = dataclasses.replace(
            config, num_heads=config.num_heads // count, num_kv_heads=config.num_kv_heads // count
        )
        return self._devices[0].choose_layout(own, held, max_tokens, num_slots)

    def make_pool(self, chunk_bytes: int, limit_bytes: int) -> LockstepPool:
        """A pool on each device."""
        pools = [device.make_pool(chunk_bytes, limit_bytes) for device in self._devices]
        return LockstepPool(cast("list[Pool]", pools))

    def make_kv(self, pool: LockstepPool, layout: KvLayout) -> LockstepKv:
        """The same slots on each device."""
        ordinals = [device.jax_device.local_hardware_id for device in self._devices]
        return LockstepKv(pool, layout, ordinals)

    def make_arena(self, pool: LockstepPool, kv: LockstepKv) -> LockstepArena | None:
        """Workspaces on each device, if any."""
        pairs = zip(self._devices, pool.members, kv.members, strict=True)
        arenas = [device.make_arena(own, cache) for device, own, cache in pairs]
        made = [arena for arena in arenas if arena is not None]
        return LockstepArena(cast("list[Arena]", made)) if made else None

    def make_host_buffer(self, block_bytes: int, limit_bytes: int) -> LockstepBuffer:
        """Host memory for each device."""
        buffers = [device.make_host_buffer(block_bytes, limit_bytes) for device in self._devices]
        return LockstepBuffer(cast("list[HostBuffer]", buffers))

    def make_copier(self) -> LockstepCopier:
        """Copies for each device."""
        copiers = [device.make_copier() for device in self._devices]
        return LockstepCopier(cast("list[Copier]", copiers))

    def make_backend(self, kv_id: int, kv: LockstepKv) -> Backend:
        """That of the devices' kind, on all of them."""
        mesh = device_mesh([device.jax_device for device in self._devices])
        backends = [device.make_backend(kv_id, kv) for device in self._devices]

        def prepare(config: ModelConfig, shape: StepShape) -> None:
            for backend in backends:
                if backend.prepare is not None:
                    backend.prepare(config, shape)

        return dataclasses.replace(backends[0], placement=on_each(mesh), prepare=prepare)

    def make_balloon(self, settle: Callable[[], object]) -> Balloon:
        """Those of all devices; the one heap of devices that are made of one CPU."""
        if self.platform == "cpu":
            return self._devices[0].make_balloon(settle)
        return _Balloons([device.make_balloon(settle) for device in self._devices])


class _Balloons:
    """As one; each holds the same."""

    def __init__(self, members: Sequence[Balloon]):
        self._members = tuple(members)
        self.retained_bytes = members[0].retained_bytes

    def keep(self, count_bytes: int) -> None:
        """So many bytes on each device."""
        for member in self._members:
            member.keep(count_bytes)

    def trim(self, keep_bytes: int) -> None:
        """What each holds beyond so many bytes."""
        for member in self._members:
            member.trim(keep_bytes)
