"""Proves what the design assumes about CUDA's memory pool, XLA's allocator and CUDA graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from gpu_check_lib.report import Job, Report, main
from gpu_check_lib.sizes import GIB, MIB

_CHUNK_BYTES = 2 * MIB
_EVERYTHING = 1 << 62
_GRAPHS_OFF = "--xla_gpu_enable_command_buffer="
_WORK_S = 1.0


def stage(job: Job) -> None:
    """Each question on its own; one that fails does not hide the others."""
    from ellm_jax.devices import open_devices
    from gpu_check_lib.measure import machine

    [device] = open_devices("cpu" if job.dry_run else "cuda")
    report = job.report
    report.data["machine"] = machine()
    report.add("device", report.data["machine"]["device"])
    looks: list[Callable[[], None]] = [
        lambda: _mapping(report, "cpu" if job.dry_run else "cuda:0"),
        lambda: _mapping_beside_work(report, "cpu" if job.dry_run else "cuda:0", small=job.dry_run),
        lambda: _graphs(job),
        lambda: _waiting(report, small=job.dry_run),
    ]
    if job.dry_run:
        report.skip("memory pool: trim, threshold")
    else:
        memory = device.memory  # type: ignore[attr-defined]
        looks += [
            lambda: _allocator(report, memory, device),
            lambda: _trim(report, memory),
            lambda: _threshold(report, memory),
        ]
    failed = []
    for look in looks:
        try:
            look()
        except Exception as error:
            failed.append(f"{type(error).__name__}: {error}")
            report.add("a question failed", failed[-1][:200])
    if failed:
        raise RuntimeError("; ".join(failed))


def _mapping(report: Report, device: str) -> None:
    """Microseconds per chunk of every call, alone and with its neighbours."""
    from ellm_jax import _native

    times = _native.time_mapping(device, _CHUNK_BYTES, 64, 7)
    medians = {what: sorted(us)[len(us) // 2] for what, us in times.items()}
    report.data["mapping_us_per_2_mib"] = {"median": medians, "runs": times}
    for what, us in medians.items():
        report.add(f"us per 2 MiB: {what}", f"{us:.1f}")


def _mapping_beside_work(report: Report, device: str, *, small: bool) -> None:
    """The same while the device computes: a call that waits for what runs takes as long as that."""
    from ellm_jax import _native
    from gpu_check_lib.measure import long_work

    work, operand, seconds = long_work(_WORK_S, small=small)
    begin = time.monotonic()
    running = work(operand)
    begun_s = time.monotonic() - begin
    runs: dict[str, list[float]] = {}
    while not running.is_ready():
        times = _native.time_mapping(device, _CHUNK_BYTES, 16, 1)
        if not running.is_ready():
            for what, us in times.items():
                runs.setdefault(what, []).extend(us)
    data = {"work_ms": 1e3 * seconds, "call_ms": 1e3 * begun_s, "runs": runs}
    report.data["mapping_beside_work"] = data
    what = f"mapping while {1e3 * seconds:.0f} ms of work run"
    if not runs:
        report.add(what, "returned only when the work was over")
        return
    report.add(what, f"{len(next(iter(runs.values())))} rounds before the work was over")
    for call, us in runs.items():
        median = sorted(us)[len(us) // 2]
        report.add(f"us per 2 MiB beside work: {call}", f"{median:.1f}, at most {max(us):.1f}")


def _allocator(report: Report, memory: Any, device: Any) -> None:
    """What of XLA's allocator can be seen from outside."""
    from ellm_jax.devices.allocator import check_allocator

    check_allocator(memory, device.jax_device)
    report.add("XLA allocates from the default pool", "yes", "yes", True)
    stats = device.jax_device.memory_stats()
    report.data["memory_stats"] = stats
    report.add("memory_stats", "none" if stats is None else ", ".join(sorted(stats)))
    usage = memory.usage()
    report.add("release threshold as XLA leaves it", f"{usage.threshold} bytes")


def _trim(report: Report, memory: Any) -> None:
    """Whether a trim after a step with large temporaries lowers what the device has in use."""
    from gpu_check_lib.measure import large_temp

    step, stated = large_temp(4 * GIB)
    memory.keep(_EVERYTHING)
    step().block_until_ready()  # what libraries take for good is there after this
    memory.synchronize()
    memory.trim(0)
    base = memory.usage()
    free_before, _ = memory.memory_info()
    step().block_until_ready()
    kept = memory.usage()
    free_kept, _ = memory.memory_info()
    begin = time.perf_counter()
    unsynchronised = memory.trim(0)
    trim_s = time.perf_counter() - begin
    begin = time.perf_counter()
    memory.synchronize()
    sync_s = time.perf_counter() - begin
    begin = time.perf_counter()
    synchronised = memory.trim(0)
    trim_s += time.perf_counter() - begin
    after = memory.usage()
    free_after, _ = memory.memory_info()
    report.data["trim"] = {
        "stated_temp_bytes": stated,
        "reserved_before": base.reserved,
        "reserved_after_step": kept.reserved,
        "reserved_after_trim": after.reserved,
        "given_without_synchronize": unsynchronised,
        "given_after_synchronize": synchronised,
        "free_before": free_before,
        "free_with_temp_kept": free_kept,
        "free_after": free_after,
        "trim_ms": 1e3 * trim_s,
        "synchronize_ms": 1e3 * sync_s,
    }
    grown = kept.reserved - base.reserved
    report.add("temp stated / grown", f"{stated / MIB:.0f} / {grown / MIB:.0f} MiB")
    back = (free_after - free_kept) / max(1, free_before - free_kept)
    report.add_share("of it the device has back after a trim", back, 0.95)
    report.add(
        "trim without / after a context sync",
        f"{unsynchronised / MIB:.0f} / {synchronised / MIB:.0f} MiB in {1e3 * trim_s:.1f} ms",
    )


def _threshold(report: Report, memory: Any) -> None:
    """What a step costs when the driver gives its memory back each time, and when it keeps it."""
    from gpu_check_lib.measure import large_temp, seconds_per_call

    found = {}
    for label, count_bytes in (("64 MiB", 64 * MIB), ("1 GiB", GIB)):
        step, _ = large_temp(count_bytes)
        for kind, keep in (("threshold 0", 0), ("kept", _EVERYTHING)):
            memory.keep(keep)
            # Each call is waited for: that is when the driver gives memory back.
            alone = seconds_per_call(lambda step=step: step().block_until_ready(), 10)
            found[f"{label}, {kind}, waited for"] = 1e6 * alone
            found[f"{label}, {kind}, queued"] = 1e6 * seconds_per_call(step, 10)
    memory.keep(_EVERYTHING)
    report.data["threshold_us_per_step"] = found
    for what, us in found.items():
        report.add(f"us per step: {what}", f"{us:.0f}")


def _graphs(job: Job) -> None:
    """Whether XLA replays CUDA graphs with this allocator: many small kernels, with and without."""
    found = {}
    for kind, flags in (("graphs", ""), ("no graphs", _GRAPHS_OFF)):
        code = "from gpu_check_lib import facts; facts.time_small_kernels()"
        given = os.environ.get("XLA_FLAGS", "")
        # A CPU build of XLA does not know the flag.
        more = "" if job.dry_run else flags
        ended = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env={**os.environ, "XLA_FLAGS": f"{given} {more}".strip()},
            capture_output=True,
            text=True,
            check=False,
            timeout=max(10.0, job.left_s),
        )
        if ended.returncode:
            raise RuntimeError(f"{kind}: {ended.stderr.strip()[-400:]}")
        found[kind] = json.loads(ended.stdout.strip().splitlines()[-1])
    job.report.data["small_kernels"] = found
    for kind, times in found.items():
        job.report.add(
            f"64 small kernels, {kind}",
            f"{times['device_us']:.0f} us on the device, {times['host_us']:.0f} us to dispatch",
        )


def time_small_kernels() -> None:
    """Times a program of many dependent kernels; prints JSON."""
    from ellm_jax.devices import open_devices

    open_devices("auto")
    import jax
    import jax.numpy as jnp

    from gpu_check_lib.measure import seconds_per_call

    def chain(x: Any) -> Any:
        for _ in range(64):
            # A reduction ends a fusion: each round is a kernel of its own.
            x = x + jnp.max(x) * 1e-6
        return x

    jitted = jax.jit(chain)
    x = jnp.ones(1 << 16)
    device_s = seconds_per_call(lambda: jitted(x), 20)
    begin = time.perf_counter()
    last = jitted(x)
    host_s = time.perf_counter() - begin
    last.block_until_ready()
    print(json.dumps({"device_us": 1e6 * device_s, "host_us": 1e6 * host_s}))


def _waiting(report: Report, *, small: bool) -> None:
    """What makes the host wait inside a call: a condition, a loop of known and of unknown length,
    behind work that takes the device a while."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    size, rounds = (128, 2) if small else (8192, 16)
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)

    def work(a: Any) -> Any:
        return lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(a @ x), a)

    cases: dict[str, Callable[[Any], Any]] = {
        "neither": work,
        "a condition": lambda a: lax.cond(work(a)[0, 0] > 0, jnp.sin, jnp.cos, a),
        "a scan": lambda a: lax.scan(lambda x, _: (jnp.tanh(x), None), work(a), length=8)[0],
        "a while loop": lambda a: lax.while_loop(
            lambda x: x[0, 0] > 2, lambda x: x - 1, work(a).astype(jnp.float32)
        ),
    }
    found = {}
    for name, case in cases.items():
        jitted = jax.jit(case)
        jitted(a).block_until_ready()
        begin = time.perf_counter()
        result = jitted(a)
        called_s = time.perf_counter() - begin
        result.block_until_ready()
        found[name] = called_s / (time.perf_counter() - begin)
        report.add(f"share of a step the call takes, {name}", f"{found[name]:.0%}")
    report.data["share_in_call"] = found


if __name__ == "__main__":
    main(stage)
