"""`ellm serve` as a process: its memory under bad requests, and its end under many streams."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("grpc_status", reason="serving needs pip install 'ellm-jax[serve]'")

import grpc
from grpc_server import WAIT_S, endless

from ellm_jax.protocol.v1 import ellm_pb2_grpc

OPTIONS = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--model-name", "small"]
OPTIONS += ["--json", "--quiet", "--no-warm-up", "--device-memory", "64MiB"]
SEED = 20261123
BAD_REQUESTS = 400
GROWTH_MAX = 32 * 2**20
TOKENS = 600
ASKED = {"model": "small", "prompt": [5, 6, 7], "temperature": 0, "ignore_eos": True}


@contextlib.contextmanager
def process() -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, and its addresses."""
    command = [sys.executable, "-P", "-m", "ellm_jax", "serve", *OPTIONS]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert running.stdout is not None
        where = json.loads(running.stdout.readline())
        yield running, where["http"], where["grpc"]
    finally:
        running.kill()
        running.wait(WAIT_S)


def resident_bytes(running: subprocess.Popen[str]) -> int:
    lines = Path(f"/proc/{running.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def send_bad(client: httpx.Client, rng: random.Random, count: int) -> None:
    """Requests of which hardly any makes sense; each is answered."""
    good = json.dumps({**ASKED, "prompt": "Once upon a time", "max_tokens": 2}).encode()
    given = {"content-type": "application/json"}
    for number in range(count):
        changed = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(changed))
            changed[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        body = bytes(changed)
        if number % 4 == 0:
            body = b'{"prompt": "' + b"x" * rng.randint(10**5, 2 * 10**6)  # and no end
        path = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/nothing")[number % 4]
        headers = given | {"x-request-id": f"bad-{number}"}
        reply = client.post(path, content=body, headers=headers)
        assert 200 <= reply.status_code < 500, reply.text


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
def test_bad_requests_leave_no_memory_behind():
    rng = random.Random(SEED)
    with (
        process() as (running, address, _),
        httpx.Client(base_url=f"http://{address}", timeout=WAIT_S) as client,
    ):
        send_bad(client, rng, BAD_REQUESTS)
        before = resident_bytes(running)
        send_bad(client, rng, BAD_REQUESTS)
        grown = resident_bytes(running) - before
        assert grown < GROWTH_MAX, f"{grown} bytes more after {BAD_REQUESTS} requests"
        assert running.poll() is None


class HttpReader:
    """Reads a stream on a thread.

    Attributes:
        begun: set with the first event, and at the end.
        tokens: how many came.
        done: whether the stream said that it is whole.
        error: what it said instead.
    """

    def __init__(self, address: str):
        self.begun = threading.Event()
        self.tokens, self.done, self.error = 0, False, None
        self._url = f"http://{address}/v1/completions"
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        asked = {**ASKED, "max_tokens": TOKENS, "stream": True, "return_token_ids": True}
        try:
            with httpx.stream("POST", self._url, json=asked, timeout=WAIT_S) as reply:
                for line in reply.iter_lines():
                    self._take(line.removeprefix("data: "))
        finally:
            self.begun.set()

    def _take(self, event: str) -> None:
        if event == "[DONE]":
            self.done = True
        elif event:
            said = json.loads(event)
            self.error = said.get("error", self.error)
            choices = said.get("choices", ())
            self.tokens += sum(len(choice["token_ids"]) for choice in choices)
            self.begun.set()

    def join(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "a stream hangs"


class GrpcReader(HttpReader):
    """The same over gRPC."""

    def __init__(self, address: str):
        self._address = address
        super().__init__(address)

    def _read(self) -> None:
        with grpc.insecure_channel(self._address) as channel:
            stub = ellm_pb2_grpc.EngineServiceStub(channel)
            try:
                for part in stub.GenerateStream(endless(TOKENS), timeout=WAIT_S):
                    self.tokens += sum(len(delta.token_ids) for delta in part.deltas)
                    self.done = self.done or part.HasField("usage")
                    self.begun.set()
            except grpc.RpcError as error:
                self.error = {"message": error.details()}
            finally:
                self.begun.set()


def test_a_signal_lets_the_streams_of_both_transports_end_whole():
    with process() as (running, http_address, grpc_address):
        readers = [HttpReader(http_address) for _ in range(8)]
        readers += [GrpcReader(grpc_address) for _ in range(8)]
        for reader in readers:
            assert reader.begun.wait(WAIT_S)
        open_ones = sum(not reader.done for reader in readers)
        running.send_signal(signal.SIGTERM)
        for reader in readers:
            reader.join()
        assert open_ones, "all were over before the signal came"
        ends = [(reader.tokens, reader.done, reader.error) for reader in readers]
        assert ends == [(TOKENS, True, None)] * len(readers)
        assert running.wait(WAIT_S) == 0
