"""Starting weights that already look back and copy.

Keeping names and things the same through a story takes heads that find an earlier token and copy
it. From random weights they appear only after far more text than a few minutes of training see, so
the model starts with a rough hand-made version of them, and training refines it:

- layer 0 holds heads that attend one, two and three tokens back and note what stood there;
- layers 1 and 2 hold heads that look for a place whose noted predecessor is the current token
  (what followed it there is likely to follow again);
- from layer 1 on, every head adds what it attends to back to the stream as the same token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ellm_jax.models import ModelConfig

_CONSTANT = 0.1  # in the first dimension of every embedding; the same for all, so logits ignore it
_POSITION_STRENGTH = 4.5
_MATCH_STRENGTH = 2.4
_NOTE = 0.05
_COPY = 0.1


def with_copying_heads(
    params: dict[str, jax.Array], config: ModelConfig, seed: int
) -> dict[str, jax.Array]:
    """Random parameters (as the decoder makes them) with the heads described above put in."""
    rng = np.random.default_rng(seed)
    dim, hidden = config.head_dim, config.hidden_size
    group = config.num_heads // config.num_kv_heads
    embed = np.array(params["embed"])
    embed[:, 0] = _CONSTANT
    qkv, out = np.array(params["blocks.qkv"]), np.array(params["blocks.o"])
    keys, values = config.q_size, config.q_size + config.kv_size

    seen = _projection(rng, dim, hidden)
    notes = [_projection(rng, dim, hidden) for _ in range(group)]
    # Half the pairs of dimensions turn fast with distance: good for "one back". The slowest ones
    # hardly turn: good for matching tokens wherever they are.
    pairs = dim // 2
    fast = np.zeros(dim)
    fast[: pairs * 3 // 8] = np.sqrt(_POSITION_STRENGTH / (pairs * 3 // 8))
    slow = np.r_[pairs * 5 // 8 : pairs, pairs + pairs * 5 // 8 : dim]

    qkv[0, keys : keys + dim] = 0.0
    qkv[0, keys : keys + dim, 0] = fast
    qkv[0, values : values + dim] = seen
    for back in range(1, group + 1):
        rows = slice((back - 1) * dim, back * dim)
        qkv[0, rows] = 0.0
        qkv[0, rows, 0] = _turned(fast, config.rope.theta, -back)
        out[0, :, rows] = _NOTE * notes[back - 1].T

    last = config.num_kv_heads - 1
    for layer in (1, 2):
        key_rows = keys + last * dim + slow
        qkv[layer, key_rows] = _MATCH_STRENGTH * notes[0][slow]
        for head in range(last * group, config.num_heads):
            qkv[layer, head * dim + slow] = _MATCH_STRENGTH * seen[slow]
    for layer in range(1, config.num_layers):
        for kv_head in range(config.num_kv_heads):
            copied = _projection(rng, dim, hidden)
            qkv[layer, values + kv_head * dim : values + (kv_head + 1) * dim] = copied
            for head in range(kv_head * group, (kv_head + 1) * group):
                out[layer, :, head * dim : (head + 1) * dim] = _COPY * copied.T
    placed = {"embed": embed, "blocks.qkv": qkv, "blocks.o": out}
    return params | {name: jnp.asarray(value) for name, value in placed.items()}


def _projection(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Orthonormal rows that do not read the constant dimension."""
    random = rng.normal(size=(columns, rows))
    random[0] = 0.0
    return np.linalg.qr(random)[0].T.astype(np.float32)


def _turned(vector: np.ndarray, theta: float, positions: int) -> np.ndarray:
    """The vector as the rotary embedding turns it over so many positions."""
    pairs = vector.size // 2
    angle = positions * theta ** (-np.arange(pairs) / pairs)
    first, second = vector[:pairs], vector[pairs:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])
