"""What the native library was built with."""

from __future__ import annotations

from ellm_jax import _native


def has_cuda_kernels() -> bool:
    """Whether it was built with nvcc."""
    return bool(_native.cuda_ffi_registrations())
