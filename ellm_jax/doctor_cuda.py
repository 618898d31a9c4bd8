"""What `ellm doctor` finds about NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from ellm_jax.config import format_bytes
from ellm_jax.doctor_finding import Finding

_CHUNKS = 8


def look_at_gpus() -> Iterator[Finding]:
    """Looks for all that an engine on a GPU needs. Nothing of it is an error: there is the CPU."""
    from ellm_jax import _native
    from ellm_jax.devices import find_cuda

    found = find_cuda()
    yield Finding("gpu", "cuda kernels", "ok", "in this build" if found.kernels else "not in it")
    if not found.driver:
        yield Finding("gpu", "driver", "ok", found.problem.partition("; ")[0])
        return
    yield Finding("gpu", "driver", "ok", f"CUDA {found.driver}")
    for number, gpu in enumerate(_native.cuda_devices()):
        major, minor = gpu["compute_capability"]
        yield Finding(
            "gpu",
            f"cuda:{number}",
            "ok",
            f"{gpu['name']}, compute capability {major}.{minor}, "
            f"{format_bytes(gpu['free_bytes'])} free of {format_bytes(gpu['total_bytes'])}",
        )
    yield Finding("gpu", "jax plugin", "ok", found.plugin or "none")
    if found.missing is not None:
        what, remedy = found.missing
        yield Finding("gpu", "use", "warning", f"engines run on the CPU: {what}", remedy)
    yield _environment()


def _environment() -> Finding:
    """Whether XLA may be given the allocator that the engine needs."""
    import os

    from ellm_jax.devices import DeviceError
    from ellm_jax.devices.allocator import ENVIRONMENT, prepare_environment

    try:
        prepare_environment(dict(os.environ))
    except DeviceError as error:
        what, _, remedy = str(error).rpartition("; ")
        return Finding("gpu", "allocator", "warning", what, remedy)
    wanted = ENVIRONMENT["XLA_PYTHON_CLIENT_ALLOCATOR"]
    return Finding("gpu", "allocator", "ok", f"{wanted}, when an engine initialises JAX")


def try_gpu() -> Iterator[Finding]:
    """Maps memory of the first GPU, where an engine would run on it, and gives it back."""
    from ellm_jax import _native
    from ellm_jax.devices import find_cuda

    if find_cuda().missing is not None:
        return
    chunk_bytes = _native.granularity_bytes("cuda:0")
    times = _native.time_mapping("cuda:0", chunk_bytes, _CHUNKS, 1)
    parts = ", ".join(f"{what} {min(us):.0f}" for what, us in sorted(times.items()))
    yield Finding(
        "self-test",
        "gpu memory",
        "ok",
        f"mapped {_CHUNKS} chunks of {format_bytes(chunk_bytes)} and gave them back; us per "
        f"chunk: {parts}",
    )
