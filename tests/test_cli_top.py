"""`ellm top` against servers that answer well, badly, and not at all."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from ellm_jax.cli import main
from ellm_jax.cli.top_view import view

MIB = 2**20
KEY = "k" * 32


def snapshot(number: int, **more: Any) -> dict[str, Any]:
    device = {"weights": 50, "workspace": 2, "kv": 10 + number, "cache": 5, "activation": 3}
    device["free"] = 100 - sum(device.values())
    return {
        "number": number,
        "time_s": 1e9 + number,
        "limit_bytes": 100 * MIB,
        "device": {owner: count * MIB for owner, count in device.items()},
        "host_limit_bytes": 64 * MIB,
        "host_used_bytes": 16 * MIB,
        "running": number,
        "waiting": 1,
        "queued": 2,
        "offloaded": 1,
        "moving": 0,
        "prompt_tokens_per_s": 10.0,
        "output_tokens_per_s": 20.0 * number,
        "ttft_ms": {"p50": 50.0, "p95": 1500.0},
        "tpot_ms": None,
        "moves": {"inflate": {"count": 2, "bytes": 4 * MIB}},
        "asleep": False,
        **more,
    }


class FakeServer(ThreadingHTTPServer):
    """Answers every request with what `answer` says: a status and a body."""

    def __init__(self, answer: Callable[[str, str | None], tuple[int, object]]):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answer(self.path, self.headers["authorization"])
                sent = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("location", "http://127.0.0.1:1/elsewhere")
                self.send_header("content-length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.shutdown()
        self.thread.join(30)
        self.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    monkeypatch.delenv("ELLM_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    servers = []

    def start(answer: Callable[[str, str | None], tuple[int, object]]) -> str:
        servers.append(FakeServer(answer))
        return servers[-1].url

    yield start
    for server in servers:
        server.end()


def well(path: str, key: str | None) -> tuple[int, object]:
    query = dict(pair.split("=") for pair in path.partition("?")[2].split("&"))
    assert path.startswith("/dashboard/snapshots?")
    there = [snapshot(n) for n in range(1, 9) if n > int(query["since"])]
    return 200, {"model": "small", "started_s": 5.0, "snapshots": there[-int(query["most"]) :]}


def test_one_look(serve, capsys):
    assert main(["top", serve(well), "--once"]) == 0
    text = capsys.readouterr().out
    assert "small" in text
    assert "78.00 MiB of 100.00 MiB  78 %" in text
    assert "16.00 MiB of 64.00 MiB  25 %" in text
    assert "160 tokens/s" in text
    assert "50.0 ms, p95 1.5 s" in text
    # Eight snapshots in the last minute, two moves of 4 MiB in each.
    assert any(line.split() == ["inflate", "16", "x", "32.00", "MiB"] for line in text.splitlines())


def test_json_is_one_line_per_look(serve, capsys):
    assert main(["top", serve(well), "--once", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    found = json.loads(lines[0])
    assert (found["model"], found["number"]) == ("small", 8)
    assert sum(found["device"].values()) == found["limit_bytes"]


def test_keys_come_from_a_file_or_the_environment(serve, tmp_path, monkeypatch, capsys):
    def guarded(path: str, key: str | None) -> tuple[int, object]:
        return well(path, key) if key == f"Bearer {KEY}" else (401, {})

    url = serve(guarded)
    assert main(["top", url, "--once"]) == 1
    assert "wants a key; put one into ELLM_API_KEY" in capsys.readouterr().err
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert main(["top", url, "--once", "--key-file", str(tmp_path / "key")]) == 0
    monkeypatch.setenv("ELLM_API_KEY", KEY)
    assert main(["top", url, "--once"]) == 0
    assert main(["top", url, "--once", "--key-file", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {}), "has no snapshots"),
        ((503, {"error": {"message": "draining"}}), "status 503: draining"),
        ((500, b"\xff" * 100), "status 500"),
        ((302, b""), "status 302"),
        ((200, b"<html>"), "is no server of this version"),
        ((200, []), "is no server of this version"),
        ((200, {"snapshots": 3}), "is no server of this version"),
        ((200, {"model": "m", "started_s": 1, "snapshots": [{}]}), "has no asleep"),
    ],
)
def test_other_answers_are_said_plainly(serve, capsys, answer, message):
    assert main(["top", serve(lambda path, key: answer), "--once"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://"])
def test_addresses_that_are_none(url, capsys):
    assert main(["top", url, "--once"]) == 2
    assert "write http://HOST:PORT" in capsys.readouterr().err


def test_nobody_there(capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    assert main(["top", "http://127.0.0.1:1", "--once"]) == 1
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"host_limit_bytes": 0, "host_used_bytes": 0, "moves": {}, "ttft_ms": None},
        {"asleep": True, "running": 0, "output_tokens_per_s": 0.0},
        {"moves": {"resize": {"count": 1, "bytes": -3 * MIB}}},
    ],
)
def test_no_line_is_wider_than_the_terminal(width, more):
    history = [snapshot(n, **more) for n in range(1, 30)]
    console = Console(width=max(40, width), force_terminal=False)
    with console.capture() as capture:
        console.print(view({"model": "m\x1b[31m", "started_s": 1}, history, width))
    text = capture.get()
    assert "\x1b" not in text
    assert all(len(line) <= max(40, width) for line in text.splitlines())
    bar = next(line.strip() for line in text.splitlines() if line[:1] in ("█", "░"))
    assert len(bar) == min(120, max(40, width)), "the bar stands for the whole limit"


def test_it_goes_on_until_interrupted(serve):
    """In a terminal of its own: a server that goes away and comes back with other numbers."""
    state = {"broken": False, "started_s": 1.0}

    def answer(path: str, key: str | None) -> tuple[int, object]:
        if state["broken"]:
            return 503, {"error": {"message": "on its way down"}}
        status, body = well(path, key)
        return status, {**body, "model": f"run-{state['started_s']:.0f}", **_started(state)}

    url = serve(answer)
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ellm_jax", "top", url, "--interval", "0.1"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"},
        start_new_session=True,
    )
    os.close(follower)
    try:
        _read_until(leader, "run-1")
        state["broken"] = True
        _read_until(leader, "on its way down")
        state.update(broken=False, started_s=2.0)
        _read_until(leader, "run-2")
        process.send_signal(signal.SIGINT)
        _read_rest(leader)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def _started(state: dict[str, Any]) -> dict[str, float]:
    return {"started_s": state["started_s"]}


def _read_until(terminal: int, text: str, seconds: float = 60.0) -> None:
    seen = b""
    end = time.monotonic() + seconds
    while text.encode() not in seen:
        assert time.monotonic() < end, seen[-2000:]
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 65536)


def _read_rest(terminal: int, seconds: float = 60.0) -> None:
    """Until the program has ended. Unread, its last words would fill the terminal and hold it."""
    end = time.monotonic() + seconds
    with contextlib.suppress(OSError):  # the other end is closed
        while True:
            assert time.monotonic() < end, "it goes on"
            if select.select([terminal], [], [], 0.2)[0] and not os.read(terminal, 65536):
                return
