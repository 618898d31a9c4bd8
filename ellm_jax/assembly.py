"""Puts an engine together from a checkpoint: pool, KV cache, weights, compiled steps, loop."""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ellm_jax._native import KvCache, KvLayout, OutOfMemory, Pool
from ellm_jax.checkpoint import load_model, read_config, resolve_dtype, weights_bytes
from ellm_jax.config import EngineConfig, format_bytes
from ellm_jax.host_loop import HostLoop
from ellm_jax.memory.ledger import Ledger
from ellm_jax.memory.system import default_limit_bytes
from ellm_jax.models.config import ModelConfig
from ellm_jax.request import Request
from ellm_jax.runtime import ops
from ellm_jax.runtime.buckets import Buckets
from ellm_jax.runtime.compiler import StepCompiler, use_compilation_cache
from ellm_jax.runtime.runner import Runner
from ellm_jax.runtime.sampler import state_bytes
from ellm_jax.runtime.shapes import StepMode
from ellm_jax.scheduler.batching import Scheduler

TINY_MODEL = pathlib.Path(__file__).parent / "tiny"
"""The model in the package."""


_STATE_SHARE = 1 / 16
"""Most of the limit that the sampler state takes; requests that need a row of it wait for one."""


@dataclass(frozen=True)
class Assembly:
    """A loop that is ready to run, and what the engine needs to know of its parts.

    Attributes:
        loop: the host loop.
        model_config: of the model.
        dtype: what it computes in.
        max_model_len: most tokens of prompt and output together.
        smallest_need_bytes: what the smallest step with a prompt takes beside its chunks.
    """

    loop: HostLoop
    model_config: ModelConfig
    dtype: str
    max_model_len: int
    smallest_need_bytes: int


def assemble(
    path: str | pathlib.Path,
    config: EngineConfig,
    on_token: Callable[[Request], str | int | None],
    on_finish: Callable[[Request], None],
) -> Assembly:
    """Loads a checkpoint and makes everything that runs it.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or not supported.
        ValueError: `max_model_len` is more than the model can.
        MemoryError: `device_memory` does not hold the weights and the smallest step.
    """
    model_config = read_config(path)
    dtype = resolve_dtype(model_config, config.dtype)
    max_model_len = config.max_model_len or model_config.max_context
    if max_model_len > model_config.max_context:
        raise ValueError(
            f"max_model_len={max_model_len}: the model's context is {model_config.max_context} "
            "tokens; ask for that or less"
        )
    limit_bytes = config.device_memory_bytes
    if limit_bytes is None:
        limit_bytes = default_limit_bytes()
    layout = KvLayout.choose(
        model_config.num_layers,
        model_config.num_kv_heads,
        model_config.head_dim,
        2 if dtype == "bfloat16" else np.dtype(dtype).itemsize,
        max_model_len,
        config.max_num_seqs,
    )
    pool = Pool(layout.chunk_bytes, limit_bytes)
    weights = weights_bytes(model_config, dtype)
    try:
        pool.reserve("weights", weights)
    except OutOfMemory as error:
        raise MemoryError(
            f"device_memory is {format_bytes(limit_bytes)}, the weights alone take "
            f"{format_bytes(weights)} in {dtype}; raise device_memory, or choose a smaller model"
        ) from error
    kv = KvCache(pool, layout)
    # The neutral row, and one for each request that may run with penalties, bias or min_tokens.
    row_bytes = state_bytes(1, model_config.vocab_size)
    affordable = int(limit_bytes * _STATE_SHARE) // row_bytes
    state_rows = min(config.max_num_seqs + 1, max(2, affordable))
    workspace = state_rows * row_bytes

    ops.register()
    use_compilation_cache(config.compilation_cache)
    model, _ = load_model(path, dtype=dtype, progress=config.progress)
    runner = Runner(model, model_config, kv.id, config.max_num_seqs, state_rows)
    del model
    gc.collect()
    ledger = Ledger(pool, kv)
    buckets = Buckets(config.max_num_seqs, config.max_batch_tokens)
    compiler = StepCompiler(runner, buckets, progress=config.progress)
    if config.warm_up:
        compiler.warm_up()

    smallest_need_bytes = compiler.need_bytes(buckets.smallest_prefill, 1, StepMode(), True)
    missing = weights + workspace + smallest_need_bytes + layout.chunk_bytes - limit_bytes
    if missing > 0:
        compiler.close()
        raise MemoryError(
            f"device_memory is {format_bytes(limit_bytes)}; beside weights of "
            f"{format_bytes(weights)} the smallest step with its KV cache and the engine's own "
            f"arrays needs {format_bytes(limit_bytes + missing - weights)}; raise device_memory "
            f"by {format_bytes(missing)} or more"
        )
    pool.reserve("workspace", workspace)
    scheduler = Scheduler(
        ledger,
        compiler.need_bytes,
        buckets.rows_below,
        config.max_num_seqs,
        buckets.max_rows,
        state_rows - 1,
    )
    loop = HostLoop(runner, compiler, ledger, scheduler, on_token, on_finish)
    return Assembly(loop, model_config, dtype, max_model_len, smallest_need_bytes)
