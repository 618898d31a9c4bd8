"""Measures what the machine gives: how fast memory is read and how fast matrices are multiplied.

A program of its own, which imports of this package only what it finds: run in the environments of
several engines, each measures with what is installed there, and the best counts. Arguments: the
precision and the cores. Prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_READ_BYTES = 512 << 20
"""More than any cache holds, with the exception of few servers'."""
_ROWS, _INPUTS, _OUTPUTS = 1024, 4096, 4096
_TRIES = 3


def _best_s(work: Callable[[], object]) -> float:
    """The least time of several."""
    work()
    times = []
    for _ in range(_TRIES):
        begin_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin_s)
    return min(times)


def read_bytes_per_s(threads: int) -> float:
    """The maxima of large arrays, one for each thread: every byte is read once."""
    import numpy as np

    parts = [np.ones(_READ_BYTES // 4 // threads, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best_s(lambda: list(pool.map(np.max, parts)))
    return sum(part.nbytes for part in parts) / seconds


def _by_torch(precision: str, threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    kind = getattr(torch, precision)
    x, weight = torch.ones(_ROWS, _INPUTS, dtype=kind), torch.ones(_OUTPUTS, _INPUTS, dtype=kind)
    with torch.inference_mode():
        return _best_s(lambda: torch.nn.functional.linear(x, weight))


def _by_numpy(precision: str, threads: int) -> float:
    import numpy as np

    if precision != "float32":
        raise ValueError("it computes in float32")
    x, weight = np.ones((_ROWS, _INPUTS), np.float32), np.ones((_OUTPUTS, _INPUTS), np.float32)
    return _best_s(lambda: x @ weight.T)


def _by_ours(precision: str, threads: int) -> float:
    import jax
    import jax.numpy as jnp

    from ellm_jax.runtime import ops

    ops.register()
    x, weight = jnp.ones((_ROWS, _INPUTS), precision), jnp.ones((1, _OUTPUTS, _INPUTS), precision)
    layer, rows = jnp.int32(0), jnp.full(1, _ROWS, jnp.int32)
    panels = precision == "bfloat16"
    product = jax.jit(
        lambda x, weight: ops.linear(x, weight, layer, rows, precision, panels=panels)
    )
    return _best_s(lambda: product(x, weight).block_until_ready())


def matrix_rates(precision: str, threads: int) -> dict[str, float]:
    """Operations per second of a product of 1024 x 4096 by 4096 x 4096, two for each
    multiplication, by the library that did it; those that are not there are left out."""
    found = {}
    libraries = {"torch": _by_torch, "numpy": _by_numpy, "ellm": _by_ours}
    for name, measure in libraries.items():
        try:
            found[name] = 2 * _ROWS * _INPUTS * _OUTPUTS / measure(precision, threads)
        except (ImportError, AttributeError, ValueError, RuntimeError):
            continue
    return found


def main(precision: str, cores: str) -> dict[str, Any]:
    """What stands in the line."""
    chosen = {int(core) for core in cores.split(",")}
    os.sched_setaffinity(0, chosen)
    return {
        "read_bytes_per_s": read_bytes_per_s(len(chosen)),
        "matrix_rates": matrix_rates(precision, len(chosen)),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])), flush=True)
    os._exit(0)
