"""What a model asks of the engine, on an NVIDIA GPU: attention by a custom call over virtual KV,
everything else by XLA.

Matrix products and the fusions around them are XLA's and cuBLAS's, which choose an order of
summation by the shape of the whole batch; only attention promises the same bits for a row in any
batch.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ellm_jax import _native
from ellm_jax.models.ops import Finish
from ellm_jax.models.xla_ops import XlaOps
from ellm_jax.runtime.batch import check_decodes_only, sequences_of

COMPILER_OPTIONS: dict[str, bool | str] = {
    # Without it XLA copies the slice of the stacked weights that a cuBLAS call reads, for every
    # layer and step: a decode step would move its weights three times. (Off by default in XLA.)
    "xla_gpu_enable_dynamic_slice_fusion": True,
    # What goes into CUDA graphs: XLA's list without DYNAMIC_SLICE_FUSION. The offset of such a
    # slice is the layer's, so a graph with one in it would be recorded anew for every layer of
    # every step, on the host's time.
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN",
}
"""For `jax.jit(..., compiler_options=...)` of a step on CUDA."""


@functools.cache
def register() -> None:
    """Makes the native CUDA handlers known to XLA; needs no GPU. Has to precede the first lookup of
    a compiled step in the persistent cache; calling it again does nothing.

    Raises:
        RuntimeError: the native library was built without CUDA.
    """
    handlers = _native.cuda_ffi_registrations()
    if not handlers:
        raise RuntimeError(
            "device='cuda' was asked for, but this build of ellm_jax has no CUDA kernels; install "
            "it again where nvcc is on the PATH (or named in CUDACXX)"
        )
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform="CUDA")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    meta: jax.Array,
    layer: jax.Array,
    window: jax.Array,
    epoch: jax.Array,
    *,
    kv_id: int,
    sequences: int,
    max_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """`runtime.ops.attention` on CUDA.

    The metadata lies on the device, so nothing is checked against the mapped memory here: whoever
    dispatches the step does that before. The handler only enqueues kernels, and XLA may capture it
    in a CUDA graph.

    Args:
        q: `[T, Hq, D]`, float32, bfloat16 or float16 like k, v and the memory; D up to 256.
        k: `[T, Hkv, D]`.
        v: `[T, Hkv, D]`.
        meta: `i32[M]`, a packed step (`StepLayout`); its own `kv_id` is not read.
        layer: `i32[]`. It and the window are operands of their own: joined, they would be one more
            kernel for every layer.
        window: `i32[]`, how many tokens a query sees, itself included; 0 sees all.
        epoch: `i32[1]`, that of the call before.
        kv_id: registry id of the KV cache, or of a group with one cache per device.
        sequences: the most that the step holds. If there are no more rows than sequences, each has
            to have one row (`StepShape.decodes_only`); rows of one that has several are NaN.
        max_tokens: of a slot.
        scale: multiplies q . k.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; 0 leaves them.

    Returns:
        `[T, Hq, D]` like q, rows past the batch zero; and the next epoch.

    Raises:
        jax.errors.JaxRuntimeError: when the step is compiled or dispatched, if there is no such KV
            cache or its layout does not fit q, k and v.
    """
    # Memory for partial results is a result that nobody reads: XLA plans it with the step's other
    # temporaries, so the step's need is known, and a CUDA graph may hold its address.
    workspace = _native.cuda_attention_workspace_bytes(
        q.dtype.name, q.shape[0], sequences, q.shape[1], k.shape[1], q.shape[2], max_tokens
    )
    call = jax.ffi.ffi_call(
        "ellm_attention_cuda",
        (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((max(workspace, 1),), jnp.uint8),
        ),
        has_side_effect=True,
        input_output_aliases={6: 1},
    )
    out, epoch, _ = call(
        q,
        k,
        v,
        meta,
        layer,
        window,
        epoch,
        scale=np.float32(scale),
        soft_cap=np.float32(soft_cap),
        kv_id=np.int32(kv_id),
        sequences=np.int32(sequences),
    )
    return out, epoch


class _ChecksSteps(Protocol):
    def check_step(self, metadata: Any, /) -> None: ...


def check_step(kv: _ChecksSteps, meta: np.ndarray[tuple[int], np.dtype[np.int32]]) -> None:
    """Refuses a packed step that would touch what is not mapped, or that the kernels of its shape
    do not compute. On the device nobody could.

    Args:
        kv: the KV cache, or the group of caches.
        meta: `i32[M]`.

    Raises:
        RuntimeError: a slot is not mapped far enough.
        ValueError: the metadata makes no sense, or a prompt is in a step for decodes only.
    """
    kv.check_step(meta)
    check_decodes_only(meta)


def load_kernels(
    devices: list[int],
    dtype: DTypeLike,
    *,
    rows: int,
    sequences: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    max_tokens: int,
) -> None:
    """Loads the attention kernels of such steps on devices (ordinals as XLA counts them), so that
    none has to be loaded while XLA captures a CUDA graph.

    Raises:
        RuntimeError: CUDA refused, or this build has no CUDA kernels.
        ValueError: a head size that the kernels do not take.
    """
    name = np.dtype(dtype).name
    for device in devices:
        _native.load_cuda_attention(
            device, name, rows, sequences, q_heads, kv_heads, head_dim, max_tokens
        )


class CudaOps(XlaOps):
    """`ModelOps` for one packed step on a GPU. Rows past those in use hold values that mean nothing
    and disturb nothing."""

    def __init__(self, meta: jax.Array, rows: jax.Array, *, kv_id: int, max_tokens: int):
        """Takes the packed step (`i32[M]`), its token rows in use (`i32[1]`; unused, for attention
        reads them in the step and all else computes padding too), the KV cache's registry id and
        the length of its slots."""
        self._meta = meta
        self._kv_id = kv_id
        self._max_tokens = max_tokens

    def linear(
        self,
        x: jax.Array,
        weight: jax.Array,
        layer: jax.Array,
        out_dtype: DTypeLike | None = None,
        *,
        panels: bool = False,
        finish: Finish | None = None,
    ) -> jax.Array:
        """See `ModelOps.linear`. Never in TF32: float32 is there to be exact."""
        if panels:  # Nobody loads them for a GPU.
            return super().linear(x, weight, layer, out_dtype, panels=True, finish=finish)
        return lax.dot_general(
            x,
            # Indexed so that XLA sees a plain slice, at the loop's counter or of the last layer;
            # see COMPILER_OPTIONS.
            lax.dynamic_index_in_dim(weight, layer, keepdims=False, allow_negative_indices=False),
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=x.dtype if out_dtype is None else out_dtype,
        )

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: jax.Array,
        window: jax.Array,
        cache: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """See `ModelOps.attend`; the cache is the epoch (`i32[1]`)."""
        return attention(
            q,
            k,
            v,
            self._meta,
            layer,
            window,
            cache,
            kv_id=self._kv_id,
            sequences=sequences_of(self._meta.shape[0], q.shape[0]),
            max_tokens=self._max_tokens,
            scale=q.shape[-1] ** -0.5,
        )
