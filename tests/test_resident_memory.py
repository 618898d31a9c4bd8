"""The limit holds for the process as the system sees it, and memory goes back after a load."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import hf_checkpoints
import pytest

MIB = 1 << 20
LIMIT_MIB = 192
# Beyond its state before the load (Python, JAX, XLA's compiled code, weights) the process may
# take the limit and this much: heap of Python and of XLA that the load itself grows.
SLACK_MIB = 48


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


class Watch(threading.Thread):
    """Samples a process every few milliseconds and keeps the highest value."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak_bytes, self.going = pid, 0, True

    def run(self) -> None:
        while self.going:
            self.peak_bytes = max(self.peak_bytes, resident_bytes(self.pid))
            time.sleep(0.005)

    def stop(self) -> int:
        self.going = False
        self.join()
        return self.peak_bytes


@pytest.mark.slow
def test_resident_memory_keeps_to_the_limit_and_falls_after_the_load(tmp_path):
    # 32 KiB of KV per token, so that the pool is what a process of this size shows.
    config = hf_checkpoints.config_dict(hf_checkpoints.CASES["llama"])
    config |= {"num_hidden_layers": 4, "num_key_value_heads": 8, "num_attention_heads": 8}
    config |= {"head_dim": 128, "max_position_embeddings": 1024}
    weights = hf_checkpoints.make_weights(config, seed=1)
    path = hf_checkpoints.write_checkpoint(tmp_path / "model", config, weights)
    worker = Path(__file__).parent / "rss_worker.py"
    with subprocess.Popen(
        [sys.executable, "-P", str(worker), str(path), f"{LIMIT_MIB}MiB"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = resident_bytes(process.pid)
        watch = Watch(process.pid)
        watch.start()
        process.stdin.write("\n")
        process.stdin.flush()
        ledger_peak = int(process.stdout.readline().split()[1])
        peak = watch.stop()
        assert process.stdout.readline() == "loaded\n"
        after = resident_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.read()
    assert process.returncode == 0
    figures = {
        "before": before // MIB,
        "peak": peak // MIB,
        "after": after // MIB,
        "ledger peak": ledger_peak // MIB,
    }
    print(figures)
    assert ledger_peak > LIMIT_MIB * MIB * 0.5, f"the load is too small to show anything: {figures}"
    assert peak > before + 0.5 * (ledger_peak - 8 * MIB), f"the pool is not what grew: {figures}"
    assert peak <= before + (LIMIT_MIB + SLACK_MIB) * MIB, figures
    assert after <= before + SLACK_MIB * MIB, figures
