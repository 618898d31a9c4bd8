"""Has XLA take GPU memory from the device's default memory pool, and makes sure that it does.

JAX reads two variables of the environment when its backends are initialised, which is when it is
first asked for a device or an array (`jaxlib/xla_client.py`, the same in JAX 0.10 and 0.11). After
that they change nothing. No attribute of a device says which allocator it has, so it is tried out:
what JAX allocates has to show in the pool.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import jax
import numpy as np

from ellm_jax.config import format_bytes
from ellm_jax.devices.errors import DeviceError
from ellm_jax.memory.device_pool import DevicePool

ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
"""What has to be in the environment before JAX is initialised."""

_TFRT = "XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT"
_OFF = ("false", "0", "")
_PROBE_BYTES = 1 << 20
_TRIES = 3
_proven: set[object] = set()
"""Devices on which it was found that XLA allocates from the pool, as it then always will."""


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Asks for the allocator. Without effect on a JAX that is initialised.

    Raises:
        DeviceError: somebody has asked for another one.
    """
    for name, wanted in ENVIRONMENT.items():
        given = environ.get(name)
        fits = _OFF if wanted == "false" else (wanted, "")
        if given is not None and given.strip().lower() not in fits:
            raise DeviceError(
                f"{name} is {given!r}; on a GPU the engine moves memory between KV cache and "
                f"activations, for which it has to be {wanted!r}; unset it, or use device='cpu'"
            )
    if environ.get(_TFRT, "0").strip().lower() not in _OFF:
        raise DeviceError(
            f"{_TFRT} is {environ[_TFRT]!r}; that client of JAX has no cuda_async allocator; "
            "unset it, or use device='cpu'"
        )
    environ.update(ENVIRONMENT)


def check_allocator(pool: DevicePool, device: jax.Device) -> None:
    """Makes sure that XLA allocates from the pool. Tried out once for a device.

    Raises:
        DeviceError: it does not.
    """
    if device in _proven:
        return
    grown = 0
    for _ in range(_TRIES):  # others may free memory meanwhile
        grown = max(grown, _growth(pool, device))
        if grown >= _PROBE_BYTES:
            _proven.add(device)
            return
    settings = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    raise DeviceError(
        f"JAX has another allocator than cuda_async on {device}: {format_bytes(_PROBE_BYTES)} "
        f"of it added {format_bytes(grown)} to the device's memory pool. It was "
        "initialised before the engine could choose. Make the first engine before anything "
        f"else uses JAX, or start the program with {settings}"
    )


def _growth(pool: DevicePool, device: jax.Device) -> int:
    """By how much more the pool is used when JAX takes `_PROBE_BYTES`."""
    # What was freed before counts as used until now.
    pool.synchronize()
    before = pool.usage().used
    probe = jax.device_put(np.zeros(_PROBE_BYTES, np.uint8), device)
    probe.block_until_ready()
    return pool.usage().used - before
