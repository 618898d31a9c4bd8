"""Random weights made on the device: a model of any size, without a checkpoint of that size."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ellm_jax.models import ModelConfig, param_shapes
from ellm_jax.models.shards import WHOLE, Shards

_SEED = 2506_15155
_BLOCKS = 64
"""Most pieces that a matrix is made in, so that little is needed beside the result."""


def random_params(
    config: ModelConfig,
    dtype: np.dtype[Any],
    places: Sequence[jax.sharding.Sharding | None],
    shards: Shards = WHOLE,
) -> Iterator[tuple[str, jax.Array]]:
    """Yields the parameters of `param_shapes`, of each the parts of all devices in their order; the
    same at every call on the same kind of device, and others when they are divided otherwise.

    Norms are ones and biases zeros. Matrices are uniform with the variance 1 / inputs, so that the
    size of what flows through the layers neither grows nor vanishes, and no score is infinite.
    """
    for name, whole in param_shapes(config).items():
        shape = shards.part_shape(name, whole)
        for index, place in enumerate(places):
            if name.endswith("norm"):
                make = partial(jnp.ones, shape, dtype)
            elif name.endswith("bias"):
                make = partial(jnp.zeros, shape, dtype)
            else:
                number = zlib.crc32(name.encode(), index)
                make = partial(_matrices, number, shape, whole[-1], dtype)
            yield name, jax.jit(make, out_shardings=place)()


def _matrices(number: int, shape: tuple[int, ...], inputs: int, dtype: np.dtype[Any]) -> jax.Array:
    """`[..., N, K]`, uniform within sqrt(3 / inputs) of 0."""
    rows, columns = shape[-2:]
    blocks = math.gcd(rows, _BLOCKS)
    # The generator is named: the default one would take several times as long.
    key = jax.random.fold_in(jax.random.key(_SEED, impl="rbg"), number)
    scale = math.sqrt(3 / inputs)

    def block(index: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, index)
        drawn = jax.random.uniform(own, (rows // blocks, columns), jnp.float32, -scale, scale)
        return drawn.astype(dtype)

    made: jax.Array = lax.map(block, jnp.arange(blocks * math.prod(shape[:-2])))
    return made.reshape(shape)
