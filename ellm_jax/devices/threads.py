"""The one pool of threads on the CPU: XLA's, which the native kernels run on too.

XLA makes it when JAX initialises its CPU backend, and takes the number of threads from a variable
of the environment (`xla/pjrt/utils.cc`), or else one for each core that the process may use.
After that it is fixed. A quota of processor time is none of its concerns, but of ours.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import MutableMapping

import jax

from ellm_jax.devices.errors import DeviceError
from ellm_jax.runtime import ops

_VARIABLE = "PJRT_NPROC"
_VARIABLES = (_VARIABLE, "NPROC")
"""What XLA looks at, in order."""

_QUOTA = pathlib.Path("/sys/fs/cgroup/cpu.max")


def cpu_quota(file: pathlib.Path = _QUOTA) -> float | None:
    """The control group's share of processor time, in cores; None where there is no limit."""
    try:
        allowed, period = file.read_text().split()
        return int(allowed) / int(period)
    except (OSError, ValueError):
        return None


def usable_cores(file: pathlib.Path = _QUOTA) -> int:
    """Cores that this process may use: those it is bound to, as far as its quota pays for them. At
    least one."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota(file)
    return cores if quota is None else max(1, min(cores, round(quota)))


def start_pool(threads: int | None, environ: MutableMapping[str, str] = os.environ) -> None:
    """Has XLA make its pool, unless it has one.

    Args:
        threads: how many it has to have. None: as many as there are usable cores, or what somebody
            told XLA; a pool that is there already will do.
        environ: of this process; unchanged afterwards.

    Raises:
        DeviceError: there is one with another number of threads.
    """
    if threads is not None or not any(name in environ for name in _VARIABLES):
        _start(threads or usable_cores(), environ)
    if threads is None:
        return
    ops.register()
    there = ops.pool_threads()
    if there != threads:
        raise DeviceError(
            f"threads={threads}: JAX's CPU backend runs with {there} since it was first used, "
            "and cannot change; make the first engine before anything else uses JAX, start the "
            f"program with {_VARIABLE}={threads}, or leave threads out"
        )


def _start(threads: int, environ: MutableMapping[str, str]) -> None:
    # For the time of the start only: what this process starts later is none of our business.
    before = environ.get(_VARIABLE)
    environ[_VARIABLE] = str(threads)
    try:
        jax.devices("cpu")
    finally:
        if before is None:
            del environ[_VARIABLE]
        else:
            environ[_VARIABLE] = before
