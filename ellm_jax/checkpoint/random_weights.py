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

from ellm_jax.models import ModelConfig, Quantization, held_params, param_shapes
from ellm_jax.models.shards import WHOLE, Shards

_Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]
"""Makes a matrix of this shape from a key."""

_SEED = 2506_15155
_STEPS = 127
"""The largest int8 weight."""
_SMALL_STEPS = 7
"""The largest 4-bit weight that has an opposite."""
_BLOCKS = 64
"""Most pieces that a matrix is made in, so that little is needed beside the result."""


def random_params(
    config: ModelConfig,
    dtype: np.dtype[Any],
    places: Sequence[jax.sharding.Sharding | None],
    shards: Shards = WHOLE,
    quantization: str | Quantization | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Yields the parameters of `held_params`, of each the parts of all devices in their order; the
    same at every call on the same kind of device, and others when they are divided otherwise.

    Norms are ones and biases zeros. Matrices are uniform with the variance 1 / inputs, so that the
    size of what flows through the layers neither grows nor vanishes, and no score is infinite.
    Those that are held in 8 or 4 bits are drawn so, over all their steps that have an opposite.
    """
    whole = param_shapes(config)
    for name, held in held_params(config, quantization).items():
        shape = shards.part_shape(name, held.shape)
        matrix = name.removesuffix("_scale").removesuffix("_zero")
        inputs = whole.get(matrix, whole["embed"])[-1]
        for index, place in enumerate(places):
            if name.endswith("norm"):
                make = partial(jnp.ones, shape, dtype)
            elif name.endswith("bias"):
                make = partial(jnp.zeros, shape, dtype)
            elif name.endswith("_zero"):
                make = partial(jnp.full, shape, _SMALL_STEPS + 1, jnp.uint8)
            elif name.endswith("_scale"):
                most = _STEPS if held.dtype == "float32" else _SMALL_STEPS
                # The steps from -most to most have the variance most (most + 1) / 3.
                scale = math.sqrt(3 / (inputs * most * (most + 1)))
                make = partial(jnp.full, shape, scale, held.dtype)
            else:
                number = zlib.crc32(name.encode(), index)
                draw: _Draw = partial(_uniform, math.sqrt(3 / inputs), dtype)
                by_row = shape
                if held.dtype == "int8":
                    draw = _int8
                elif held.dtype == "uint8":
                    draw = _two_steps
                    by_row = (*shape[:-3], shape[-3] * shape[-2], shape[-1])
                make = partial(_matrices, number, shape, by_row, draw)
            yield name, jax.jit(make, out_shardings=place)()


def _uniform(
    bound: float, dtype: np.dtype[Any], key: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    drawn = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return drawn.astype(dtype)


def _int8(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    drawn: jax.Array = jax.random.randint(key, shape, -_STEPS, _STEPS + 1, jnp.int8)
    return drawn


def _two_steps(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Two 4-bit weights to a byte, both from -7 to 7, plus 8."""
    drawn = jax.random.randint(key, (2, *shape), 1, 2 * _SMALL_STEPS + 2, jnp.uint8)
    return drawn[0] | drawn[1] << 4


def _matrices(
    number: int,
    shape: tuple[int, ...],
    by_row: tuple[int, ...],
    draw: _Draw,
) -> jax.Array:
    """Drawn independently, `[..., rows, columns]` at a time."""
    rows, columns = by_row[-2:]
    blocks = math.gcd(rows, _BLOCKS)
    # The generator is named: the default one would take several times as long.
    key = jax.random.fold_in(jax.random.key(_SEED, impl="rbg"), number)

    def block(index: jax.Array) -> jax.Array:
        return draw(jax.random.fold_in(key, index), (rows // blocks, columns))

    made: jax.Array = lax.map(block, jnp.arange(blocks * math.prod(by_row[:-2])))
    return made.reshape(shape)
