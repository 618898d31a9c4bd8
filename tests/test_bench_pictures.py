"""Saved results as figures, and figures as pictures."""

import builtins
import json
import struct
from pathlib import Path

import pytest

from ellm_jax.bench.figures import figures_of
from ellm_jax.bench.pictures import PictureUnavailable, draw_bars, draw_memory
from ellm_jax.bench.trace_request import WorkloadError
from ellm_jax.cli import main

MIB = 2**20


def run(speed: float, batch: int) -> dict[str, object]:
    return {
        "total_tokens_per_s": speed,
        "decoding_tokens_per_s": speed / 10,
        "peak_running": batch,
        "ttft_ms": {"mean": 1500.0},
    }


OFFLINE = {
    "kind": "offline",
    "label": "2048/256",
    "policies": {
        "static": {"runs": [run(100, 2), run(120, 2)]},
        "elastic": {"runs": [run(200, 6), run(260, 7)]},
    },
    "timelines": {
        "elastic": {
            "time_s": [0.0, 0.5, 1.0],
            "owners": {
                "free": [90 * MIB, 40 * MIB, 10 * MIB],
                "kv": [0, 40 * MIB, 80 * MIB],
                "activation": [10 * MIB, 20 * MIB, 10 * MIB],
            },
            "limit_bytes": [100 * MIB] * 3,
            "host_bytes": [0, 5 * MIB, 7 * MIB],
            "host_limit_bytes": [9 * MIB] * 3,
            "events": [
                {"time_s": 0.4, "kind": "inflate", "bytes": 3 * MIB},
                {"time_s": 0.6, "kind": "offload", "bytes": 0},
                {"time_s": 0.7, "kind": "trim", "bytes": MIB},
            ],
        }
    },
}
RATE = {"rate_per_s": 2.0, "ttft_ms": {"mean": 50.0, "p99": None}, "tpot_ms": {"p99": 9.0}}
ONLINE = {
    "kind": "online",
    "label": "trace",
    "policies": {"intra": {"runs": [{"goodput_per_s": 3.5, "rates": [RATE]}]}},
}
MEMORY = {
    "kind": "memory",
    "label": "",
    "policies": {"inter": {"runs": [{"context": 64, "batch": 5, "decode_tokens_per_s": 8.0}]}},
}


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_figures_of_each_kind() -> None:
    longer = {**OFFLINE, "label": "8192/256"}
    figures = figures_of([OFFLINE, longer])
    assert list(figures) == [
        "total throughput (tokens/s)",
        "decoding throughput (tokens/s)",
        "largest batch (requests)",
        "mean TTFT (s)",
    ]
    batches = figures["largest batch (requests)"]
    assert batches["8192/256"] == {"static": [2, 2], "elastic": [6, 7]}
    assert list(batches) == ["2048/256", "8192/256"]
    assert figures["mean TTFT (s)"]["2048/256"]["static"] == [1.5, 1.5]
    assert figures_of([ONLINE]) == {
        "goodput (requests/s)": {"trace": {"intra": [3.5]}},
        "mean TTFT (s)": {"2/s": {"intra": [0.05]}},
        "p99 TPOT (ms)": {"2/s": {"intra": [9.0]}},
    }
    assert figures_of([MEMORY])["largest batch (requests)"] == {"context 64": {"inter": [5.0]}}
    for mixed in ([OFFLINE, MEMORY], [{}], [{"kind": "other", "policies": {}}]):
        with pytest.raises(WorkloadError, match="results of one kind"):
            figures_of(mixed)


def test_pictures_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_bars(figures_of([OFFLINE]), tmp_path / "bars.png", "Bars")
    width, height = png_size(tmp_path / "bars.png")
    assert 300 < height < width < 2400
    draw_memory(OFFLINE["timelines"]["elastic"], tmp_path / "memory.svg", "Memory, 2 tiers")
    drawn = (tmp_path / "memory.svg").read_text()
    assert "<svg" in drawn
    with pytest.raises(WorkloadError, match="nothing to draw"):
        draw_memory({"time_s": [], "events": []}, tmp_path / "no.png", "")
    with pytest.raises(WorkloadError, match="no figures"):
        draw_bars({}, tmp_path / "no.png", "")


def test_without_the_library_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(PictureUnavailable, match=r"pip install 'ellm-jax\[bench\]'"):
        draw_bars(figures_of([OFFLINE]), tmp_path / "bars.png", "")
    saved = tmp_path / "r.json"
    saved.write_text(json.dumps(OFFLINE))
    assert main(["bench", "picture", str(saved), "--output", str(tmp_path / "b.png")]) == 1
    assert "matplotlib" in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    saved, online = tmp_path / "r.json", tmp_path / "o.json"
    saved.write_text(json.dumps(OFFLINE))
    online.write_text(json.dumps(ONLINE))
    picture = tmp_path / "p.png"
    command = ["bench", "picture", str(saved), "--output", str(picture)]
    assert main(command) == 0
    bars = png_size(picture)
    assert main([*command, "--memory", "elastic", "--title", "A title"]) == 0
    assert png_size(picture) != bars
    assert main([*command[:2], str(online), *command[3:]]) == 0
    capsys.readouterr()
    for wrong, said in [
        ([*command, "--memory", "intra"], "no memory of 'intra'; there is: elastic"),
        ([*command[:3], str(online), *command[3:]], "results of one kind"),
        ([*command[:3], str(online), *command[3:], "--memory", "elastic"], "give one file"),
        ([*command[:-1], str(tmp_path / "p.xyz")], "p.xyz: "),
        ([*command[:2], str(picture), *command[3:]], "UTF-8"),
        ([*command[:2], str(tmp_path / "none"), *command[3:]], "cannot be read"),
    ]:
        assert main(wrong) == 2
        assert said in capsys.readouterr().err
    saved.write_text('{"kind": "offline", "label": "x", "policies": {"static": {"runs": [{}]}}}')
    assert main(command) == 2
    assert "lacks 'total_tokens_per_s'" in capsys.readouterr().err
