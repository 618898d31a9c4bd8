"""Random weights made on the device: a model of any size, without a checkpoint of that size."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ellm_jax.models import ModelConfig, held_params
from ellm_jax.models.shards import WHOLE, Shards

_SEED = 2506_15155
_STEPS = 127
"""The largest int8 weight."""
_BLOCKS = 64
"""Most pieces that a matrix is made in, so that little is needed beside the result."""


def random_params(
    config: ModelConfig,
    dtype: np.dtype[Any],
    places: Sequence[jax.sharding.Sharding | None],
    shards: Shards = WHOLE,
    quantization: str | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Yields the parameters of `held_params`, of each the parts of all devices in their order; the
    same at every call on the same kind of device, and others when they are divided otherwise.

    Norms are ones and biases zeros. Matrices are uniform with the variance 1 / inputs, so that the
    size of what flows through the layers neither grows nor vanishes, and no score is infinite.
    Those that are held as int8 are drawn so, over all its steps.
    """
    inputs = 0
    for name, held in held_params(config, quantization).items():
        shape = shards.part_shape(name, held.shape)
        for index, place in enumerate(places):
            if name.endswith("norm"):
                make = partial(jnp.ones, shape, dtype)
            elif name.endswith("bias"):
                make = partial(jnp.zeros, shape, dtype)
            elif name.endswith("_scale"):  # of the matrix before it
                make = partial(jnp.full, shape, math.sqrt(3 / inputs) / _STEPS, jnp.float32)
            else:
                inputs = held.shape[-1]
                number = zlib.crc32(name.encode(), index)
                draw = partial(_uniform, math.sqrt(3 / inputs), dtype)
                make = partial(_matrices, number, shape, draw if held.dtype is None else _int8)
            yield name, jax.jit(make, out_shardings=place)()


def _uniform(
    bound: float, dtype: np.dtype[Any], key: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    drawn = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return drawn.astype(dtype)


def _int8(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    drawn: jax.Array = jax.random.randint(key, shape, -_STEPS, _STEPS + 1, jnp.int8)
    return drawn


def _matrices(
    number: int,
    shape: tuple[int, ...],
    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array],
) -> jax.Array:
    """`[..., N, K]`, drawn independently."""
    rows, columns = shape[-2:]
    blocks = math.gcd(rows, _BLOCKS)
    # The generator is named: the default one would take several times as long.
    key = jax.random.fold_in(jax.random.key(_SEED, impl="rbg"), number)

    def block(index: jax.Array) -> jax.Array:
        return draw(jax.random.fold_in(key, index), (rows // blocks, columns))

    made: jax.Array = lax.map(block, jnp.arange(blocks * math.prod(shape[:-2])))
    return made.reshape(shape)
