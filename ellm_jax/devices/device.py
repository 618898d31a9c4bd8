"""What an engine asks of the device that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax

from ellm_jax._native import KvLayout
from ellm_jax.memory.balloon import Balloon
from ellm_jax.memory.host_tier import Buffer, CopyEngine
from ellm_jax.memory.kv_format import KvFormat
from ellm_jax.memory.lockstep import AnyArena, AnyKv, AnyPool
from ellm_jax.models.config import ModelConfig
from ellm_jax.models.shards import Shards
from ellm_jax.runtime.backend import Backend


class Device(Protocol):
    """Makes the parts of an engine that differ between kinds of device. Pools and KV caches that
    are given to it are those that it has made.

    Attributes:
        platform: "cpu" or "cuda".
        jax_device: what JAX calls it.
        shards: how a model is divided on it, where it stands for several.
        rounding_bytes: most that XLA's allocator holds beside what was asked of it.
    """

    @property
    def platform(self) -> str:
        """See the class."""

    @property
    def jax_device(self) -> jax.Device:
        """See the class."""

    @property
    def shards(self) -> Shards:
        """See the class."""

    @property
    def rounding_bytes(self) -> int:
        """See the class."""

    def default_limit_bytes(self) -> int:
        """The limit of an engine that was given none."""

    def choose_layout(
        self, config: ModelConfig, held: KvFormat, max_tokens: int, num_slots: int
    ) -> KvLayout:
        """Where the K and V of tokens lie, in chunks that the device can map."""

    def make_pool(self, chunk_bytes: int, limit_bytes: int) -> AnyPool:
        """Physical memory of the device."""

    def make_kv(self, pool: Any, layout: KvLayout) -> AnyKv:
        """Slots over it."""

    def make_arena(self, pool: Any, kv: Any) -> AnyArena | None:
        """Where the kernels take workspaces; None where XLA gives them to them."""

    def make_host_buffer(self, block_bytes: int, limit_bytes: int) -> Buffer:
        """The host tier's memory, which the device can copy to and from."""

    def make_copier(self) -> CopyEngine:
        """Copies between the two."""

    def make_backend(self, kv_id: int, kv: Any) -> Backend:
        """How steps run over a KV cache, which custom calls know by `kv_id`."""

    def make_balloon(self, settle: Callable[[], object]) -> Balloon:
        """Steers XLA's allocator; `settle` waits for the steps in flight."""
