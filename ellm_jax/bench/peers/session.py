"""Our end of the protocol: an engine's process, what it is asked and how long it may take."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ellm_jax.bench.peers.tree_memory import TreeMemory

_QUIT_S = 5.0
_LINE_BYTES = 64 << 20
_LOG_TAIL_BYTES = 4096
_LOG_LINES = 3
_SHOWN_CHARACTERS = 200


class PeerError(Exception):
    """An engine could not do what it was asked; it can be asked further."""


class PeerLost(PeerError):
    """An engine's process died, hangs, or does not speak the protocol: nothing more comes of it."""


@dataclass(frozen=True)
class Launch:
    """How an engine's process is started.

    Attributes:
        name: of the engine.
        command: of the process.
        env: its whole environment.
        settings: that its driver loads the model with.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)


class Session:
    """A running engine. A context manager: leaving ends the process and all that it started.

    Attributes:
        started_s: when the process was started, of `time.monotonic`.
    """

    def __init__(self, launch: Launch):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the process ends
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.started_s = time.monotonic()
        try:
            # A session of its own, so that whatever it starts can be ended with it.
            self._process = subprocess.Popen(
                launch.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=dict(launch.env),
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise PeerLost(f"{launch.command[0]} cannot be started: {error.strerror}") from error
        self._memory = TreeMemory(self._process.pid)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def peak_bytes(self) -> int:
        """Most resident memory of the process and its descendants so far."""
        return self._memory.peak_bytes()

    def ask(self, asked: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Sends a line and returns the answer to it.

        Raises:
            PeerError: the engine says that it cannot.
            PeerLost: no answer, none in time, or none that makes sense.
        """
        line = (json.dumps(asked) + "\n").encode()
        # In a thread: an engine that does not read must not hold us up for longer than its time.
        threading.Thread(target=self._write, args=(line,), daemon=True).start()
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerLost(
                f"no answer in {timeout_s:g} s to {asked['do']!r}; raise --timeout if it is slow"
            ) from None
        if not answer:
            raise PeerLost(f"the process ended{self._how()}{self._said()}")
        return self._checked(answer)

    def _checked(self, answer: bytes) -> dict[str, Any]:
        try:
            read = json.loads(answer)
        except (ValueError, RecursionError):
            read = None
        if not isinstance(read, dict) or not isinstance(read.get("ok"), bool):
            shown = answer[:_SHOWN_CHARACTERS].decode(errors="replace").strip()
            raise PeerLost(f"what it answers is no answer: {shown!r}")
        if not read["ok"]:
            raise PeerError(str(read.get("error", "it gave no reason")))
        return read

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        # It died, which the answer that never comes will say, or was ended meanwhile.
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            while line := self._process.stdout.readline(_LINE_BYTES):
                self._answers.put(line)
        self._answers.put(b"")

    def _how(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_QUIT_S)
            if code < 0:
                return f" by {signal.Signals(-code).name}"
            return f" with exit code {code}"
        return ""

    def _said(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LOG_TAIL_BYTES))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        last = [line for line in lines if line][-_LOG_LINES:]
        return f": {' | '.join(last)}" if last else ""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        """Asks it to go, and ends what is still there."""
        self._memory.stop()
        threading.Thread(target=self._write, args=(b'{"do": "quit"}\n',), daemon=True).start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_QUIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # Descendants that left the group may still hold the pipe; the thread is theirs then.
        self._reader.join(_QUIT_S)
        self._log.close()
