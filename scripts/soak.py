"""Runs an oversubscribed engine for minutes, aborting at random, and watches it from outside.

    python scripts/soak.py --minutes 10 [--model DIR] [--device-memory 16MiB] [--host-memory 8MiB]

Clients in a process of their own submit, stream, abandon and abort requests without pause, more
than the limit holds, while limits change now and then. This process reads the other's resident
memory twice a second. At the end it prints one line of JSON: the slope of resident memory over the
second half in MiB per hour, what the ledger counts when all is over beside what it counted at the
start, and how many requests ended how. The exit status is 1 if the ledger is not back where it was,
or a request ended in an error.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

_OWNERS = ("kv", "cache", "activation", "weights", "workspace", "free")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", help="a checkpoint (default: the model in the package)")
    parser.add_argument("--device-memory", default="16MiB")
    parser.add_argument("--host-memory", default="8MiB")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_inside(args: argparse.Namespace) -> None:
    """The engine and its clients."""
    from ellm_jax import Engine, EngineConfig, SamplingParams

    config = EngineConfig(
        device_memory=args.device_memory,
        host_memory=args.host_memory,
        ttft_ms=200.0,
        tpot_ms=100.0,
        progress=False,
    )
    ends: Counter[str] = Counter()
    lock = threading.Lock()
    with Engine.from_pretrained(args.model, config) as engine:
        engine.warm_up()
        engine.trim()
        baseline = engine.memory().by_owner()
        vocab = engine.model_config.vocab_size
        over = time.monotonic() + 60 * args.minutes

        def client(number: int) -> None:
            rng = random.Random(1000 * args.seed + number)
            while time.monotonic() < over:
                head = [number % 3 + 3] * rng.choice([0, 0, 100])
                prompt = head + [rng.randrange(3, vocab) for _ in range(rng.randint(1, 250))]
                params = SamplingParams(
                    temperature=rng.choice([0.0, 0.8]),
                    max_tokens=rng.randint(1, 200),
                    ignore_eos=True,
                    frequency_penalty=rng.choice([0.0, 0.0, 0.0, 0.5]),
                )
                name = f"{number}-{rng.random()}"
                if rng.random() < 0.3:
                    stream = engine.stream(prompt, params, request_id=name)
                    for _, _output in zip(range(rng.randint(0, 40)), stream, strict=False):
                        pass
                    stream.close()
                    reason = "abandoned"
                else:
                    future = engine.submit(prompt, params, request_id=name)
                    if rng.random() < 0.3:
                        time.sleep(rng.random())
                        engine.abort(name)
                    reason = str(future.result().outputs[0].finish_reason)
                with lock:
                    ends[reason] += 1

        threads = [threading.Thread(target=client, args=(n,)) for n in range(args.clients)]
        for thread in threads:
            thread.start()
        print("started", flush=True)
        limits = [args.device_memory, "14MiB", "24MiB"] if args.model is None else []
        while time.monotonic() < over:
            time.sleep(min(5.0, max(0.0, over - time.monotonic())))
            for limit in limits:
                engine.resize(device_memory=limit)
        engine.resize(device_memory=args.device_memory)
        for thread in threads:
            thread.join()
        engine.trim()
        stats = engine.stats()
        result = {
            "ends": ends,
            "baseline": baseline,
            "ledger": engine.memory().by_owner(),
            "host_used_bytes": engine.memory().host_used_bytes,
            "preemptions": stats.preemptions,
            "moves": stats.moves,
            "steps": stats.steps,
        }
    print(json.dumps(result), flush=True)


def resident_mib(pid: int) -> float | None:
    """VmRSS of a process; None once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def slope_per_hour(samples: list[tuple[float, float]]) -> float:
    """Least squares through (seconds, MiB), in MiB per hour."""
    n = len(samples)
    mean_t = sum(t for t, _ in samples) / n
    mean_m = sum(m for _, m in samples) / n
    spread = sum((t - mean_t) ** 2 for t, _ in samples)
    return 3600 * sum((t - mean_t) * (m - mean_m) for t, m in samples) / spread


def main() -> int:
    args = parse_args()
    if args.inside:
        run_inside(args)
        return 0
    # -P: the installed package, not the source tree without its native library.
    command = [sys.executable, "-P", __file__, *sys.argv[1:], "--inside"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        if child.stdout.readline() != "started\n":
            return 1
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(child.stdout or ()))
        reader.start()
        samples: list[tuple[float, float]] = []
        begin = time.monotonic()
        end_s = 60 * args.minutes
        while reader.is_alive():
            reader.join(0.5)
            now, resident = time.monotonic() - begin, resident_mib(child.pid)
            if resident is not None and now < end_s:
                samples.append((now, resident))
                if sys.stderr.isatty():
                    print(f"\r{now:5.0f} s  {resident:7.1f} MiB", end="", file=sys.stderr)
    if child.returncode or not lines:
        return 1
    result = json.loads(lines[-1])
    late = [(t, m) for t, m in samples if t > end_s / 2]
    thirds = len(samples) // 3
    result["resident_mib"] = {
        "slope_per_hour": round(slope_per_hour(late), 2),
        "median_of_each_third": [
            round(sorted(m for _, m in part)[len(part) // 2], 1)
            for part in (samples[:thirds], samples[thirds : 2 * thirds], samples[2 * thirds :])
        ],
        "peak": round(max(m for _, m in samples), 1),
    }
    result["ledger_is_back"] = result["ledger"] == result["baseline"]
    print(json.dumps(result))
    clean = result["ledger_is_back"] and not result["host_used_bytes"]
    return 0 if clean and not result["ends"].get("error") else 1


if __name__ == "__main__":
    sys.exit(main())
