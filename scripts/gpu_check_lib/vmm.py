"""What mapping costs while requests decode, and how memory moves between activations and KV."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from gpu_check_lib.report import Job, Report, main
from gpu_check_lib.sizes import MIB, Sizes, sizes

_SPARE_CHUNKS = 8
_ROUNDS = 4
_SLACK = 2 * MIB
_MAPPED_CHUNKS = 64


def stage(job: Job) -> None:
    """Both, in one engine."""
    from gpu_check_lib.inside import clear_memory, decoding, open_engine, watch_steady
    from gpu_check_lib.measure import machine

    chosen = sizes(dry_run=job.dry_run)
    batch = chosen.batches[1]
    report = job.report
    tokens = chosen.decode_len - chosen.context - 1
    engine = open_engine(
        job,
        chosen,
        max_num_seqs=batch,
        max_batch_tokens=2 * batch,
        max_model_len=chosen.decode_len,
        policy="intra",
    )
    with engine:
        report.data["machine"] = machine()
        _compiling(engine, report, batch)
        clear_memory(engine)
        with decoding(engine, batch, chosen.context, tokens) as running:
            steady = watch_steady(engine, running, chosen.seconds, chosen.steps)
        report.data["steady"] = {
            "batch": running,
            "step_ms": 1e3 * steady.step_s,
            "stats": dataclasses.asdict(steady.stats),
            "kv": engine._loop.ledger.kv.stats(),
        }
        report.add_most("mapping in steady decoding", steady.stats.map_s / steady.watched_s, 0.01)
        engine.trim()
        moves = _Moves(engine, report, chosen)
        moves.run(job)
        moves.uneven()


def _compiling(engine: Any, report: Report, batch: int) -> None:
    """What compiling takes of the device, which nobody counts."""
    from gpu_check_lib.inside import use_steps
    from gpu_check_lib.measure import DeviceMemory, Watch

    memory = DeviceMemory(getattr(engine._loop.ledger._balloon, "pool", None))
    with Watch(memory) as watch:
        use_steps(engine, [(batch, batch)])
    taken = watch.peak_bytes - watch.samples[0][1]
    report.data["compiling_bytes"] = taken
    report.add("most memory that compiling a step took", f"{taken / MIB:.0f} MiB")


class _Moves:
    """Moves memory from activations to KV and back, as large steps and requests would make it."""

    def __init__(self, engine: Any, report: Report, chosen: Sizes):
        from gpu_check_lib.measure import DeviceMemory

        self._engine = engine
        self._report = report
        self._bytes = chosen.inflate_bytes
        self._uneven = chosen.uneven
        self._ledger = engine._loop.ledger
        self._pool = getattr(self._ledger._balloon, "pool", None)
        self._memory = DeviceMemory(self._pool)

    def run(self, job: Job) -> None:
        """Rounds of both ways while the memory is watched."""
        from gpu_check_lib.inside import on_thread
        from gpu_check_lib.measure import Watch, large_temp, nvidia_smi

        step, stated = large_temp(self._bytes)
        self._need = stated + _SLACK
        ledger = self._ledger
        usage = ledger.usage()
        # The limit lets one of the two have the memory, not both.
        spare = _SPARE_CHUNKS * ledger.chunk_bytes
        limit = usage["weights"] + usage["workspace"] + self._need + spare
        self._engine.resize(device_memory=limit)
        self._engine.trim()
        # What CUDA and its libraries hold beside what is counted, once a step has run.
        on_thread(self._engine, lambda: self._step(step))
        self._engine.trim()
        beside = self._memory.used_bytes() - self._counted()
        events, times = ledger.events, {"inflate": [], "deflate": []}
        with Watch(self._memory) as watch:
            for _ in range(_ROUNDS):
                on_thread(self._engine, lambda: self._step(step))
                times["inflate"].append(on_thread(self._engine, self._grow))
                times["deflate"].append(on_thread(self._engine, self._shrink))
        counts = {kind: count for kind, (count, _) in events.totals().items()}
        peak = watch.peak_bytes - beside
        self._report.data["moves"] = {
            "bytes": self._need,
            "limit_bytes": limit,
            "inflate_ms": times["inflate"],
            "deflate_ms": times["deflate"],
            "events": counts,
            "beside_bytes": beside,
            "peak_bytes": peak,
            "samples": [(round(at, 4), used - beside) for at, used in watch.samples],
            "nvidia_smi": nvidia_smi("memory.used"),
        }
        size = f"{self._need / MIB:.0f} MiB"
        for kind, ms in times.items():
            self._report.add(f"{kind} {size}", f"{sorted(ms)[len(ms) // 2]:.1f} ms")
        inflations = counts.get("inflate", 0)
        self._report.add("inflations", f"{inflations}", f"{_ROUNDS}", inflations >= _ROUNDS)
        if self._pool is None:
            self._report.skip("memory as nvidia-smi sees it, against the limit")
            return
        over = peak - limit
        self._report.add(
            "most memory against the limit",
            f"{peak / MIB:.0f} of {limit / MIB:.0f} MiB",
            "never over",
            over <= 0,
        )
        usage = self._pool.usage()
        self._report.add(
            "memory pool beside what was asked of it",
            f"{(usage.reserved - usage.used) / MIB:.0f} MiB",
        )
        draw_watch(self._report, job)

    def uneven(self) -> None:
        """Steps whose needs rise and fall beside KV: whether the pool reserves more than the ledger
        has given to activations, because a piece that was kept fits no other size."""
        from gpu_check_lib.inside import on_thread
        from gpu_check_lib.measure import large_temp

        steps = [large_temp(size) for size in self._uneven]
        ledger = self._ledger
        usage = ledger.usage()
        chunks = _MAPPED_CHUNKS if self._pool is not None else _SPARE_CHUNKS
        limit = usage["weights"] + usage["workspace"] + max(stated for _, stated in steps)
        limit += _SLACK + (chunks + _SPARE_CHUNKS) * ledger.chunk_bytes
        self._engine.resize(device_memory=limit)
        self._engine.trim()
        live = 0 if self._pool is None else self._pool.usage().used
        found = []

        def run() -> None:
            slot = ledger.open_slot(ledger.tile_tokens)
            ledger.extend(slot, chunks * ledger.tile_tokens)
            for step, stated in steps:
                lease = ledger.reserve(stated + _SLACK, [], [])
                step().block_until_ready()
                reserved = 0 if self._pool is None else self._pool.usage().reserved
                given = ledger.usage()["activation"]
                ledger.finish(lease)
                found.append({"need": stated, "given": given, "reserved": reserved - live})
            ledger.release(slot)

        on_thread(self._engine, run)
        self._report.data["uneven"] = found
        if self._pool is None:
            self._report.skip("memory pool against the ledger, steps of uneven sizes")
            return
        from ellm_jax.devices.cuda import CudaDevice

        over = max(each["reserved"] - each["given"] for each in found)
        allowed = CudaDevice.rounding_bytes
        self._report.add(
            "memory pool above the ledger, steps of uneven sizes",
            f"{over / MIB:.0f} MiB",
            f"at most {allowed / MIB:.0f} MiB",
            over <= allowed,
        )

    def _counted(self) -> int:
        """What the pool counts as taken, less what activations hold and do not use now."""
        usage = self._ledger.usage()
        reserved = 0 if self._pool is None else self._pool.usage().reserved
        chunks = usage["physical"] - sum(usage[o] for o in ("weights", "workspace", "activation"))
        return int(reserved + chunks)

    def _step(self, step: Any) -> None:
        """A step with this need."""
        lease = self._ledger.reserve(self._need, [], [])
        step().block_until_ready()
        self._ledger.finish(lease)

    def _grow(self) -> float:
        """A request takes all of it for its KV; milliseconds."""
        ledger = self._ledger
        self._slots = []
        chunks = self._need // ledger.chunk_bytes
        most = ledger.kv.layout.max_tokens // ledger.tile_tokens
        begin = time.perf_counter()
        while chunks > 0:
            slot = ledger.open_slot(ledger.tile_tokens)
            self._slots.append(slot)
            taken = min(chunks, most)
            ledger.extend(slot, taken * ledger.tile_tokens)
            chunks -= taken
        return 1e3 * (time.perf_counter() - begin)

    def _shrink(self) -> float:
        """It ends, and a step takes the memory back; milliseconds until the step could start."""
        ledger = self._ledger
        begin = time.perf_counter()
        for slot in self._slots:
            ledger.release(slot)
        lease = ledger.reserve(self._need, [], [])
        spent = time.perf_counter() - begin
        ledger.finish(lease)
        return 1e3 * spent


def draw_watch(report: Report, job: Job) -> None:
    """Memory over time while it moves, against the limit."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    moves = report.data["moves"]
    times, used = zip(*moves["samples"], strict=True)
    figure, axes = pyplot.subplots(figsize=(9, 3.5), layout="constrained")
    axes.plot(times, [u / MIB for u in used], color="#0072b2", linewidth=1, label="in use")
    axes.axhline(moves["limit_bytes"] / MIB, color="black", linestyle="--", label="limit")
    axes.set_xlabel("time (s)")
    axes.set_ylabel("device memory (MiB)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(job.out / "vmm.png", dpi=144)
    pyplot.close(figure)


if __name__ == "__main__":
    main(stage)
