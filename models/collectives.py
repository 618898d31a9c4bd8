"""What the devices of a divided decoder tell each other, inside a step that runs on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ellm_jax.models.shards import Shards

AXIS = "model"
"""The one axis of the mesh."""


def device_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The devices in a row."""
    return Mesh(np.array(devices), (AXIS,))


def on_each(mesh: Mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_of(placement: Sharding | None) -> Mesh | None:
    """The several devices that `on_each` was made for; None where there is one."""
    mesh = placement.mesh if isinstance(placement, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def each_device(placement: Sharding | None) -> list[Sharding | None]:
    """Each of the devices alone, in their order."""
    mesh = mesh_of(placement)
    return [placement] if mesh is None else [SingleDeviceSharding(d) for d in mesh.devices.flat]


def param_sharding(mesh: Mesh, shards: Shards, name: str) -> NamedSharding:
    """How a parameter lies on the devices."""
    axis = shards.axis(name)
    if axis is None:
        return on_each(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def gathered(x: jax.Array) -> jax.Array:
    """`[T, N / count]` of each device, side by side: `[T, N]` on every device."""
    whole: jax.Array = lax.all_gather(x, AXIS, axis=x.ndim - 1, tiled=True)
    return whole


def scored(shards: Shards, part: jax.Array, vocab_size: int) -> jax.Array:
    """Scores of the device's part of the vocabulary, `[R, V / count]`; of all of it, `[R, V]`."""
    return part if shards.count == 1 else gathered(part)[:, :vocab_size]


def closed(shards: Shards, product: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """The product with a closing matrix, whole on every device.

    Args:
        shards: how the matrix is divided.
        product: with the device's part of the matrix.
        x: `[T, K / count]`, the device's part of the inputs.
    """
    if shards.count == 1:
        return product(x)
    if shards.exact:
        return gathered(product(gathered(x)))
    total: jax.Array = lax.psum(product(x), AXIS)
    return total


def embedded(shards: Shards, table: jax.Array, tokens: jax.Array, vocab_size: int) -> jax.Array:
    """Rows of the embedding.

    Args:
        shards: how it is divided, by the vocabulary.
        table: `[V / count, H]`, the device's part.
        tokens: `i32[T]`; ids outside the vocabulary read its first or last row.
        vocab_size: V.

    Returns:
        `[T, H]`, whole on every device.
    """
    if shards.count == 1:
        return jnp.take(table, tokens, axis=0, mode="clip")
    rows = table.shape[0]
    here = jnp.clip(tokens, 0, vocab_size - 1) - lax.axis_index(AXIS) * rows
    found = jnp.take(table, here, axis=0, mode="clip")
    mine = (here >= 0) & (here < rows)
    # One device has the row and the others add zeros, which changes nothing.
    x: jax.Array = lax.psum(jnp.where(mine[:, None], found, 0), AXIS)
    return x
