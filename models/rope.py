"""Rotary position embedding, with the ways of stretching it that checkpoints use."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ellm_jax.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> NDArray[np.float32]:
    """Radians per token of each pair of dimensions, `[head_dim / 2]`, longest wavelength last.

    Worked out in float64 and rounded once, so that positions far into the context lose nothing.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = rope.theta**-exponents
    if rope.scaling == "linear":
        plain = plain / rope.factor
    elif rope.scaling == "llama3":
        plain = _stretch_long_waves(plain, rope)
    elif rope.scaling == "yarn":
        plain = _stretch_by_rotations(plain, rope, head_dim)
    return plain.astype(np.float32)


def _stretch_long_waves(plain: NDArray[np.float64], rope: RopeConfig) -> NDArray[np.float64]:
    """Llama 3.1: waves longer than the original context are divided, short ones kept.

    Between the two, the share that is kept rises linearly with the number of waves that fit into
    the original context.
    """
    waves = rope.original_context * plain / (2 * math.pi)
    kept = (waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (1 - kept) * plain / rope.factor + kept * plain


def _stretch_by_rotations(
    plain: NDArray[np.float64], rope: RopeConfig, head_dim: int
) -> NDArray[np.float64]:
    """YaRN (arXiv 2309.00071): a linear ramp over dimensions, whose ends are set by rotations.

    A pair that turns at least `beta_fast` times over the original context is kept, one that turns
    at most `beta_slow` times is divided by the factor.
    """

    def dimension_turning(rotations: float) -> float:
        wavelength = rope.original_context / rotations
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # A ramp of no width would divide by zero; a thousandth of a dimension is a step all the same.
    width = high - low if high != low else 0.001
    stretched = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
    ramped: NDArray[np.float64] = stretched * plain / rope.factor + (1 - stretched) * plain
    return ramped


def rotation(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for `apply_rotation`.

    Args:
        rope: the embedding.
        head_dim: D.
        positions: `i32[T]`, token positions in their sequences.

    Returns:
        Two `f32[T, D / 2]`.
    """
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(rope, head_dim)
    factor = rope.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rotation(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn dimension i of every head with dimension i + D/2, by cosines and sines `[T, D / 2]`;
    `[T, H, D]` in, the same out."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
