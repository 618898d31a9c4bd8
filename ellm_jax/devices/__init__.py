"""What an engine runs on: which devices there are, and what its parts are on each kind."""

from __future__ import annotations

from ellm_jax.devices.device import Device
from ellm_jax.devices.errors import DeviceError
from ellm_jax.devices.find import CudaFound, choose_platform, find_cuda
from ellm_jax.devices.group import DeviceGroup
from ellm_jax.devices.native import has_cuda_kernels

__all__ = [
    "CudaFound",
    "Device",
    "DeviceError",
    "DeviceGroup",
    "choose_platform",
    "find_cuda",
    "open_devices",
]


def open_devices(wanted: str, count: int = 1, threads: int | None = None) -> list[Device]:
    """Opens the first devices of the kind that `EngineConfig.device` asks for, and initialises JAX.

    Args:
        wanted: "auto", "cpu" or "cuda".
        count: how many of them.
        threads: of the CPU, for all of them together; None: one for each core it may use.

    Raises:
        DeviceError: there are not so many, or JAX was set up in another way before.
    """
    # Where no GPU can be meant, not even the driver is loaded.
    on_cpu = wanted == "cpu" or (wanted == "auto" and not has_cuda_kernels())
    found = CudaFound() if on_cpu else find_cuda()
    if choose_platform(wanted, found) == "cuda":
        from ellm_jax.devices.cuda import open_cuda

        return list(open_cuda(count))
    from ellm_jax.devices.cpu import open_cpu

    return list(open_cpu(count, threads))
