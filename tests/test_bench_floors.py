"""The floors of `ellm bench peers`: what is measured of the machine, and what that means."""

import json
import math
import os
import struct
import sys
from pathlib import Path

import pytest

from ellm_jax.assembly import TINY_MODEL
from ellm_jax.bench.peers.comparison import EngineRuns, Run
from ellm_jax.bench.peers.floors import Machine, faster, floors, measure_machine, reached
from ellm_jax.bench.peers.report import report, table
from ellm_jax.bench.peers.scenarios import PeerWorkload
from ellm_jax.bench.peers.session import Launch
from ellm_jax.checkpoint import read_config

CORE = str(min(os.sched_getaffinity(0)))
CONFIG = read_config(TINY_MODEL)
MACHINE = Machine(read_bytes_per_s=2e10, matrix_ops_per_s=5e11, matrix_by="x")


def matrix_sizes() -> tuple[int, int]:
    """Elements of the matrices of the layers, and of the one that scores, by the file's header."""
    with open(TINY_MODEL / "model.safetensors", "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    shapes = {name: entry["shape"] for name, entry in header.items() if "shape" in entry}
    layers = sum(
        math.prod(shape) for name, shape in shapes.items() if ".layers." in name and len(shape) == 2
    )
    head = shapes.get("lm_head.weight") or shapes["model.embed_tokens.weight"]
    return layers, math.prod(head)


@pytest.mark.parametrize(("precision", "width"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_floors_token_by_token(precision, width):
    """Against sums over every step and every pair of tokens."""
    layers, head = matrix_sizes()
    per_pair = 2 * 2 * CONFIG.num_layers * CONFIG.num_heads * CONFIG.head_dim
    kv_bytes = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim
    kv_bytes *= 4 if precision == "float32" else 2
    batch = ((4, 3), (6, 2), (5, 9))
    found = floors(MACHINE, CONFIG, precision, PeerWorkload(9, 5, 40, 3, batch))

    def prefill_s(prompt):
        pairs = sum(token + 1 for token in range(prompt))
        return (2 * prompt * layers + 2 * head + pairs * per_pair) / 5e11

    def decode_bytes(prompt, output):
        return [(layers + head) * width + (prompt + i) * kv_bytes for i in range(1, output)]

    assert found["ttft_ms"] == pytest.approx(1e3 * prefill_s(9))
    assert found["long_ttft_s"] == pytest.approx(prefill_s(40))
    assert found["decode_tokens_per_s"] == pytest.approx(4 / (sum(decode_bytes(9, 5)) / 2e10))
    assert found["long_decode_tokens_per_s"] == pytest.approx(2 / (sum(decode_bytes(40, 3)) / 2e10))
    multiply_s = sum(
        (2 * layers + 2 * head + (prompt + i) * per_pair) / 5e11
        for prompt, output in batch
        for i in range(1, output)
    )
    read = 8 * (layers + head) * width
    read += sum(kv_bytes * (prompt + i) for prompt, output in batch for i in range(1, output))
    seconds = sum(prefill_s(prompt) for prompt, _ in batch) + max(multiply_s, read / 2e10)
    assert found["batch_tokens_per_s"] == pytest.approx(14 / seconds)


def test_what_was_not_measured_has_no_floor():
    workload = PeerWorkload(9, 5, 0, 3, ())
    found = floors(Machine(2e10, 0.0, ""), CONFIG, "int8", workload)
    assert list(found) == ["decode_tokens_per_s"]


def test_the_share_that_is_reached_and_the_table():
    floor = {"decode_tokens_per_s": 100.0, "ttft_ms": 30.0, "long_ttft_s": 2.0}
    figures = {"decode_tokens_per_s": 85.0, "ttft_ms": 40.0}
    assert reached(floor, figures) == {"decode_tokens_per_s": 0.85, "ttft_ms": 0.75}
    found = {"ellm": EngineRuns({"ellm_jax": "1"}, "bfloat16", [Run(1, None, figures)])}
    titles = {"decode_tokens_per_s": "decode", "ttft_ms": "first token"}
    lines = [line.split() for line in table(report(found, titles, floor)).splitlines()]
    assert ["ellm", "floor"] in lines
    assert ["decode", "85.0", "100.0"] in lines
    assert ["first", "token", "75%"] in lines
    assert "floor" not in table(report(found, titles))


def test_of_two_measurements_the_better_counts():
    slow_memory, slow_products = Machine(2e10, 6e11, "x"), Machine(3e10, 5e11, "y")
    assert faster(slow_memory, slow_products) == Machine(3e10, 6e11, "x")
    assert faster(None, slow_memory) == faster(slow_memory, None) == slow_memory
    assert faster(None, None) is None


def test_the_machine_is_measured_in_each_environment(tmp_path: Path):
    """And an interpreter that cannot is passed over."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    launches = [
        Launch("broken", (str(broken), "-I", "child.py", CORE), dict(os.environ)),
        Launch("ours", (sys.executable, "-P", "child.py", CORE), dict(os.environ)),
    ]
    machine = measure_machine(launches, "float32", timeout_s=600.0)
    assert machine is not None
    assert 1e8 < machine.read_bytes_per_s < 1e13
    assert 1e8 < machine.matrix_ops_per_s < 1e15
    assert machine.matrix_by in ("numpy", "torch", "ellm")
    assert measure_machine(launches[:1], "float32") is None
