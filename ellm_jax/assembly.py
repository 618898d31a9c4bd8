"""Puts an engine together from a checkpoint: pool, KV cache, weights, compiled steps, loop."""

from __future__ import annotations

import gc
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from ellm_jax._native import OutOfMemory
from ellm_jax.checkpoint import (
    in_panels,
    load_model,
    read_config,
    resolve_dtype,
    resolve_quantization,
    weights_bytes,
)
from ellm_jax.config import EngineConfig, format_bytes
from ellm_jax.devices import Device, DeviceGroup, open_devices
from ellm_jax.executor import DeviceExecutor
from ellm_jax.host_loop import HostLoop
from ellm_jax.memory.events import EventLog
from ellm_jax.memory.host_tier import HostTier
from ellm_jax.memory.kv_format import kv_format
from ellm_jax.memory.ledger import Ledger
from ellm_jax.models.config import ModelConfig
from ellm_jax.models.decoder import Decoder
from ellm_jax.models.quantization import Quantization, quantization_of
from ellm_jax.request import Request
from ellm_jax.runtime.buckets import Buckets
from ellm_jax.runtime.compiler import StepCompiler, use_compilation_cache
from ellm_jax.runtime.runner import Runner
from ellm_jax.runtime.sampler import state_bytes
from ellm_jax.runtime.shapes import StepMode
from ellm_jax.scheduler.batching import Scheduler
from ellm_jax.scheduler.cost import CostModel
from ellm_jax.scheduler.policy import POLICIES, Sizes
from ellm_jax.scheduler.slo import SloBuffer

TINY_MODEL = pathlib.Path(__file__).parent / "tiny"
"""The model in the package."""


_STATE_SHARE = 1 / 64
"""Most of the limit that the sampler state takes; requests that need a row of it wait for one."""
_SMALLEST_SHARE_TOKENS = 2048
"""KV of so many tokens is the least that the host tier's logical size is scaled down to."""


@dataclass(frozen=True)
class Assembly:
    """A loop that is ready to run, and what the engine needs to know of its parts.

    Attributes:
        loop: the host loop.
        compiler: of its steps.
        model_config: of the model.
        dtype: what it computes in.
        max_model_len: most tokens of prompt and output together.
        smallest_need_bytes: what the smallest step with a prompt takes beside its chunks.
    """

    loop: HostLoop
    compiler: StepCompiler
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
        DeviceError: there is no such device, or JAX was set up in another way before.
        ValueError: `max_model_len` is more than the model can, or it cannot be divided so, or the
            device has no quantised weights, or no int8 KV.
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
    # An engine that was closed before may still hold its weights, until a cycle of its is found.
    gc.collect()
    devices = open_devices(config.device, config.tensor_parallel, config.threads)
    device: Device = devices[0] if len(devices) == 1 else DeviceGroup(devices)
    device.shards.check(model_config)
    if config.quantization is not None and device.platform != "cpu":
        raise ValueError(
            f"quantization={config.quantization!r}: the {device.platform} backend takes weights "
            "in float32 and bfloat16 only; leave quantization out, or use device='cpu'"
        )
    if config.kv_dtype != "auto" and device.platform != "cpu":
        raise ValueError(
            f"kv_dtype={config.kv_dtype!r}: the {device.platform} backend holds K and V in what it "
            "computes in; leave kv_dtype out, or use device='cpu'"
        )
    limit_bytes = config.device_memory_bytes
    if limit_bytes is None:
        limit_bytes = device.default_limit_bytes()
    held = kv_format(config.kv_dtype, dtype)
    layout = device.choose_layout(model_config, held, max_model_len, config.max_num_seqs)
    pool = device.make_pool(layout.chunk_bytes, limit_bytes)
    quantization: str | Quantization | None = config.quantization
    if device.platform == "cpu" and config.load_format != "dummy":
        quantization = resolve_quantization(path, model_config, config.quantization)
    if device.platform == "cpu" and dtype == "bfloat16":
        quantization = in_panels(model_config, quantization, device.shards)
    weights = weights_bytes(model_config, dtype, device.shards, quantization)
    try:
        pool.reserve("weights", weights)
    except OutOfMemory as error:
        held_in = quantization_of(quantization).name if quantization else dtype
        raise MemoryError(
            f"device_memory is {format_bytes(limit_bytes)}, the weights alone take "
            f"{format_bytes(weights)} in {held_in}; raise device_memory, or choose a smaller model"
        ) from error
    kv = device.make_kv(pool, layout)
    rules = POLICIES[config.policy](
        Sizes(max_model_len, config.max_num_seqs, config.max_batch_tokens)
    )
    # The neutral row, and one for each request that may run with penalties, bias or min_tokens.
    row_bytes = state_bytes(1, model_config.vocab_size)
    affordable = int(limit_bytes * _STATE_SHARE) // row_bytes
    state_rows = min(config.max_num_seqs + 1, max(2, affordable))
    workspace = state_rows * row_bytes + device.rounding_bytes

    backend = device.make_backend(kv.id, kv)
    use_compilation_cache(config.compilation_cache)

    def load(progress: bool) -> Decoder:
        return load_model(
            path,
            dtype=dtype,
            progress=progress,
            load_format=config.load_format,
            placement=backend.placement,
            shards=device.shards,
            quantization=quantization,
        )[0]

    runner = Runner(
        load(config.progress), model_config, kv.id, config.max_num_seqs, state_rows, backend
    )
    gc.collect()
    balloon = device.make_balloon(runner.settle)
    buckets = Buckets(config.max_num_seqs, rules.max_rows, skips_padding=backend.skips_padding)
    compiler = StepCompiler(runner, buckets, progress=config.progress)
    if config.warm_up:
        compiler.warm_up()

    smallest_need_bytes = compiler.need_bytes(buckets.smallest_prefill, 1, StepMode(), True)
    floor_bytes = 0
    if rules.reserved_rows:
        floor_bytes = compiler.need_bytes(
            rules.reserved_rows, config.max_num_seqs, StepMode(), True
        )
    activations = max(smallest_need_bytes, floor_bytes)
    missing = weights + workspace + activations + layout.chunk_bytes - limit_bytes
    if missing > 0:
        compiler.close()
        step = "reserved" if floor_bytes else "smallest"
        raise MemoryError(
            f"device_memory is {format_bytes(limit_bytes)}; beside weights of "
            f"{format_bytes(weights)} the {step} step with its "
            "KV cache and the engine's own arrays needs "
            f"{format_bytes(limit_bytes + missing - weights)}; raise device_memory by "
            f"{format_bytes(missing)} or more"
        )
    pool.reserve("workspace", workspace)
    events = EventLog(time.monotonic)
    ledger = Ledger(
        pool,
        kv,
        events,
        balloon=balloon,
        prefix_caching=config.prefix_caching,
        floor_bytes=floor_bytes,
        arena=device.make_arena(pool, kv),
    )
    if device.platform == "cuda":
        compiler.make_way = ledger.make_way
    cost = CostModel()
    host = slo = None
    if rules.host_tier:
        host_bytes = config.host_memory_bytes
        buffer = device.make_host_buffer(layout.chunk_bytes, host_bytes)
        host = HostTier(buffer, device.make_copier(), kv, events, cost.observe_copy)
        smallest = layout.chunks_for(min(max_model_len, _SMALLEST_SHARE_TOKENS))
        slo = SloBuffer(host_bytes, smallest * layout.chunk_bytes)
    scheduler = Scheduler(
        ledger,
        compiler.need_bytes,
        buckets.rows_below,
        rules,
        cost,
        max_num_seqs=config.max_num_seqs,
        state_rows=state_rows - 1,
        smallest_prefill=buckets.smallest_prefill,
        host=host,
        slo=slo,
    )

    executor = DeviceExecutor(runner, weights, lambda: load(progress=False))
    loop = HostLoop(executor, compiler, ledger, scheduler, on_token, on_finish, host=host, slo=slo)
    return Assembly(loop, compiler, model_config, dtype, max_model_len, smallest_need_bytes)
