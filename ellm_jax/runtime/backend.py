"""What is a device's own about steps: their operations, and what the host does around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from ellm_jax.models.config import ModelConfig
from ellm_jax.models.ops import ModelOps
from ellm_jax.runtime import ops
from ellm_jax.runtime.shapes import StepShape

Int32Array = np.ndarray[tuple[int], np.dtype[np.int32]]

OpsFactory = Callable[[jax.Array, jax.Array], ModelOps]
"""From a packed step (`i32[M]`) and its token rows in use (`i32[1]`) to its operations."""

Likeliest = Callable[[jax.Array, jax.Array], jax.Array]
"""From the scores of sampled rows (`f32[S, V]`) and how many are in use (`i32[1]`) to the likeliest
token of each (`i32[S]`), as `sampler.greedy` gives them."""

ExtraBytes = Callable[[ModelConfig, StepShape], int]
"""What the kernels of a step take beside what XLA states."""


@dataclass(frozen=True)
class Backend:
    """How steps are compiled and run on a kind of device.

    Attributes:
        make_ops: the operations of a step.
        extra_bytes: what its kernels take beside what XLA states.
        placement: where weights lie, and what steps hand on; None: JAX's default device.
        host_skips: the host leaves sampling work out that no row asks for, by choosing among two
            programs. Otherwise the step finds out itself while it runs, which needs no second
            program, but on a GPU would make the host wait in the middle of each step.
        check: refuses a packed step that touches what is not mapped, before it is dispatched;
            raises RuntimeError or ValueError. None: the kernels see to it.
        prepare: called before the first step of a shape runs, from any thread; raises RuntimeError
            or ValueError.
        compiler_options: of XLA for steps.
        skips_padding: rows past those in use cost next to nothing, so that a step may run on a
            bucket that is far too large. On a GPU only attention skips them.
        likeliest: takes over what `sampler.greedy` does, for steps without any other row.
    """

    make_ops: OpsFactory
    extra_bytes: ExtraBytes
    placement: jax.sharding.Sharding | None = None
    host_skips: bool = False
    check: Callable[[Int32Array], object] | None = None
    prepare: Callable[[ModelConfig, StepShape], object] | None = None
    compiler_options: Mapping[str, bool | str] | None = None
    skips_padding: bool = False
    likeliest: Likeliest | None = None


def _native_bytes(config: ModelConfig, shape: StepShape) -> int:
    """The CPU kernels widen the rows of a bfloat16 matrix product to float32, one product at a
    time. Rows that they quantise take less."""
    widest = max(config.hidden_size, config.intermediate_size, config.q_size)
    return 4 * shape.rows * (widest + 16)


def native_backend(placement: jax.sharding.Sharding | None = None) -> Backend:
    """Steps on the CPU, by the native kernels."""
    ops.register()
    return Backend(
        ops.NativeOps, _native_bytes, placement, skips_padding=True, likeliest=ops.likeliest
    )
