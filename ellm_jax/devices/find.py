"""What of CUDA there is: an engine needs all of it, and is told what is missing first."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import Any

from ellm_jax.devices.errors import DeviceError
from ellm_jax.devices.native import has_cuda_kernels
from ellm_jax.memory.device_pool import (
    CudaError,
    CudaUnavailable,
    device_count,
    driver_version,
    load_driver,
)

_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
_USE_CPU = "or use device='cpu'"


@dataclass(frozen=True)
class CudaFound:
    """What of CUDA there is. What is missing is empty text or 0.

    Attributes:
        kernels: whether the native library has the CUDA kernels.
        platforms: the platforms that JAX is confined to, such as "cpu"; "" for no limit.
        plugin: JAX's CUDA plugin, with its version.
        driver: the CUDA version of the driver.
        problem: why there is no driver.
        gpus: how many the process may use.
    """

    kernels: bool = False
    platforms: str = ""
    plugin: str = ""
    driver: str = ""
    problem: str = ""
    gpus: int = 0

    @property
    def missing(self) -> tuple[str, str] | None:
        """What is missing first, and what to do about it; None where all is there."""
        if not self.kernels:
            return (
                "this build of ellm_jax has no CUDA kernels",
                "install CUDA's compiler (nvcc) and build again: pip install --force-reinstall "
                f"--no-deps . -C cmake.define.ELLM_CUDA=ON, {_USE_CPU}",
            )
        if not self.driver:
            problem, _, remedy = self.problem.rpartition("; ")
            return (problem, remedy) if problem else (self.problem, "use device='cpu'")
        if not self.gpus:
            return (
                f"the NVIDIA driver (CUDA {self.driver}) shows this process no GPU",
                f"see nvidia-smi and CUDA_VISIBLE_DEVICES, {_USE_CPU}",
            )
        if not self.plugin:
            return (
                f"there are {self.gpus} GPUs, but JAX has no CUDA plugin",
                f"run: pip install 'ellm-jax[cuda]', {_USE_CPU}",
            )
        allowed = {name.strip() for name in self.platforms.split(",") if name.strip()}
        if allowed and not allowed & {"cuda", "gpu"}:
            return (
                f"JAX is confined to {self.platforms!r} (JAX_PLATFORMS)",
                f"unset JAX_PLATFORMS, or set it to cuda,cpu, {_USE_CPU}",
            )
        return None


def find_cuda() -> CudaFound:
    """Looks for everything; starts the driver, but nothing of JAX."""
    kernels = has_cuda_kernels()
    platforms, plugin = _platforms(), _plugin()
    try:
        driver: Any = load_driver()
        version, gpus = driver_version(driver), device_count(driver)
    except (CudaUnavailable, CudaError) as error:
        return CudaFound(kernels, platforms, plugin, problem=str(error))
    return CudaFound(kernels, platforms, plugin, version, gpus=gpus)


def choose_platform(wanted: str, found: CudaFound) -> str:
    """ "cuda" or "cpu" for what `EngineConfig.device` asks for.

    Raises:
        DeviceError: "cuda" was asked for and something of it is missing.
    """
    if wanted == "cpu":
        return "cpu"
    missing = found.missing
    if missing is None:
        return "cuda"
    if wanted == "auto":
        return "cpu"
    what, remedy = missing
    raise DeviceError(f"device={wanted!r}: {what}; {remedy}")


def _platforms() -> str:
    """What JAX is confined to. It is not imported for that: then its environment counts."""
    jax = sys.modules.get("jax")
    if jax is None:
        return os.environ.get("JAX_PLATFORMS", "")
    return str(jax.config.values.get("jax_platforms") or "")


def _plugin() -> str:
    for name in _PLUGINS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        module = "jax_plugins.xla_" + name.split("-")[1]
        if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(module):
            return f"{name} {version}"
    return ""
