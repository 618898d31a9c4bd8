"""A model of Llama-3-8B's shape against the roofline: decoding, prefill, the host's share."""

from __future__ import annotations

import math
import statistics
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu_check_lib.report import Job, Report, main
from gpu_check_lib.sizes import GIB, Sizes, sizes

_PROMPTS = 4


def stage(job: Job) -> None:
    """Decoding by batch, then prefill. An engine for each: their steps have other shapes."""
    from ellm_jax.devices import open_devices

    chosen = sizes(dry_run=job.dry_run)
    # Before anything else uses JAX: it has to take its memory from where the engine needs it.
    open_devices(chosen.device)
    from ellm_jax.bench.cuda_kernels import copy_rate, matrix_rate
    from gpu_check_lib.measure import machine

    report = job.report
    report.data["machine"] = machine()
    bandwidth, rate = copy_rate(chosen.copy_bytes), matrix_rate(chosen.matrix)
    report.data |= {"copy_bytes_per_s": bandwidth, "matrix_flop_per_s": rate}
    report.add("copy bandwidth", f"{bandwidth / 1e9:.1f} GB/s")
    report.add("bfloat16 matrix rate", f"{rate / 1e12:.2f} TFLOP/s")
    report.data["decode"] = []
    parts: list[tuple[str, Callable[[], None]]] = [
        (
            f"decoding, batch {batch}",
            partial(_decode, job, chosen, batch, bandwidth, most=batch == chosen.batches[-1]),
        )
        for batch in chosen.batches
    ]
    parts.insert(2, ("prefill", lambda: _prefill(job, chosen, rate)))
    failed = []
    for what, measure in parts:
        try:
            measure()
        except Exception as error:  # the next one has an engine of its own
            traceback.print_exc()
            failed.append(f"{what}: {type(error).__name__}: {error}")
            report.add(what, f"failed: {error}"[:200])
        _draw(report, job)
    if failed:
        raise RuntimeError("; ".join(failed))


def step_bytes(config: Any, element_bytes: int, tokens: float) -> float:
    """Bytes that a decoding step has to read: every weight but the embedding, whose rows are few,
    and K and V of so many tokens of all requests together."""
    from ellm_jax.models import param_shapes

    weights = sum(
        math.prod(shape)
        for name, shape in param_shapes(config).items()
        if name != "embed" or config.tie_embeddings
    )
    kv = 2 * config.num_layers * config.kv_size * tokens
    return element_bytes * (weights + kv)


def prefill_operations(config: Any, tokens: int) -> float:
    """Operations of a prefill: matrix products, causal attention, and one row of scores."""
    from ellm_jax.models import param_shapes

    matrices = sum(
        math.prod(shape)
        for name, shape in param_shapes(config).items()
        if name in ("blocks.qkv", "blocks.o", "blocks.gate_up", "blocks.down")
    )
    attention = 4.0 * config.num_layers * config.q_size * tokens * (tokens + 1) / 2
    return 2.0 * matrices * tokens + attention + 2.0 * config.vocab_size * config.hidden_size


def _decode(job: Job, chosen: Sizes, batch: int, bandwidth: float, *, most: bool) -> None:
    from gpu_check_lib.inside import (
        clear_memory,
        decoding,
        open_engine,
        use_steps,
        watch_steady,
    )

    report = job.report
    # Requests grow while they are watched, and none may end. Where memory is what bounds the batch,
    # room is kept for all that they may grow to.
    tokens = 1024 if most and not job.dry_run else chosen.decode_len - chosen.context - 1
    engine = open_engine(
        job,
        chosen,
        max_num_seqs=batch,
        max_batch_tokens=2 * batch,
        max_model_len=chosen.decode_len,
        policy="intra",
    )
    with engine:
        use_steps(engine, [(batch, batch)])
        clear_memory(engine)
        with decoding(engine, batch, chosen.context, tokens) as running:
            steady = watch_steady(engine, running, chosen.seconds, chosen.steps)
        limit = engine.memory().limit_bytes
        mean_batch = steady.stats.decode_tokens / steady.stats.steps
        bytes_read = step_bytes(engine.model_config, 2, mean_batch * steady.context_tokens)
    roofline_s = bytes_read / bandwidth
    found = {
        "asked": batch,
        "running": running,
        "mean_batch": mean_batch,
        "context": steady.context_tokens,
        "limit_bytes": limit,
        "step_ms": 1e3 * steady.step_s,
        "device_ms": 1e3 * steady.device_s,
        "roofline_ms": 1e3 * roofline_s,
        "tokens_per_s": mean_batch / steady.step_s,
        "share_of_roofline": roofline_s / steady.step_s,
        "host_gap": steady.gap,
        "dispatch_ms": 1e3 * steady.stats.dispatch_s / steady.stats.steps,
        "mapping": steady.stats.map_s / steady.watched_s,
    }
    report.data["decode"].append(found)
    label = f"batch {running}"
    if most:
        label += f", most in {limit / GIB:.0f} GiB" if running < batch else ", more would fit"
    else:
        report.add("requests that decode at once", f"{running}", f"{batch}", running == batch)
    report.add(
        f"decoding, {label}",
        f"{found['tokens_per_s']:.0f} tokens/s, {found['step_ms']:.2f} ms a step",
    )
    report.add_share(f"share of the roofline, {label}", found["share_of_roofline"], 0.80)
    report.add_most(f"host gap between steps, {label}", steady.gap, 0.05)
    # Much of a step, where the call waits for the device in the middle of it.
    dispatch = found["dispatch_ms"] / found["step_ms"]
    report.add(f"share of a step the call takes, {label}", f"{dispatch:.0%}")


def _prefill(job: Job, chosen: Sizes, rate: float) -> None:
    """Prompts of one step each, one after the other."""
    from ellm_jax import SamplingParams
    from gpu_check_lib.inside import open_engine, use_steps

    report = job.report
    tokens = chosen.prefill
    settings: dict[str, Any] = {"max_num_seqs": 1, "max_batch_tokens": tokens, "policy": "intra"}
    settings["max_model_len"] = tokens + 16
    with open_engine(job, chosen, **settings) as engine:
        use_steps(engine, [(tokens, 1)])
        vocab = engine.model_config.vocab_size
        prompts = [
            [(7 * number + 3 * at + 11) % (vocab - 3) + 3 for at in range(tokens)]
            for number in range(_PROMPTS + 1)
        ]
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        times = []
        for number, prompt in enumerate(prompts):
            metrics = engine.generate([prompt], params)[0].metrics
            if number == 0:
                continue
            assert metrics.first_token_s is not None
            assert metrics.first_scheduled_s is not None
            times.append(metrics.first_token_s - metrics.first_scheduled_s)
        seconds = statistics.median(times)
        operations = prefill_operations(engine.model_config, tokens)
    report.data["prefill"] = {
        "tokens": tokens,
        "seconds": times,
        "operations": operations,
        "flop_per_s": operations / seconds,
    }
    report.add(
        f"prefill of {tokens} tokens",
        f"{1e3 * seconds:.1f} ms, {operations / seconds / 1e12:.2f} TFLOP/s",
    )
    report.add_share("of the matrix rate measured", operations / seconds / rate, 0.50)


def _draw(report: Report, job: Job) -> None:
    """Steps against the roofline."""
    if not report.data["decode"]:
        return
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    found = report.data["decode"]
    places = range(len(found))
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for offset, key, label, colour in (
        (-0.25, "roofline_ms", "bytes over bandwidth", "#999999"),
        (0.0, "device_ms", "step on the device", "#56b4e9"),
        (0.25, "step_ms", "step as served", "#0072b2"),
    ):
        heights = [f[key] for f in found]
        axes.bar([p + offset for p in places], heights, 0.24, label=label, color=colour)
    axes.set_xticks(list(places), [f"batch {f['running']}" for f in found])
    axes.set_ylabel("ms")
    axes.legend(frameon=False)
    figure.savefig(job.out / "decode.png", dpi=144)
    pyplot.close(figure)


if __name__ == "__main__":
    main(stage)
