"""Commands that install and convert: bounded in time, their output kept in a file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ellm_jax.bench.peers.session import PeerError

_SHOWN_LINES = 2
_NO_REASONS = ("[notice]", "Traceback (", "The above exception", "During handling")
_SHOWN_CHARACTERS = 500


def run_logged(
    command: Sequence[str], log: Path, *, env: Mapping[str, str], timeout_s: float
) -> None:
    """Runs a command, its output appended to `log`.

    Raises:
        PeerError: it fails, cannot be started, or takes longer; says its last lines.
    """
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(command)}\n".encode())
        output.flush()
        begin = output.tell()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
            )
        except OSError as error:
            raise PeerError(f"{command[0]} cannot be started: {error.strerror}") from error
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise PeerError(
                f"not done in {timeout_s:g} s; raise --install-timeout, or look into {log}"
            ) from None
        finally:
            # Also what it started, when it is over or we are interrupted.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0:
        raise PeerError(f"{_reason(log, begin)} (all of it in {log})")


def _reason(log: Path, begin: int) -> str:
    """The lines in which the output says what is wrong, or else its last ones; of a traceback only
    the error."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    lines = [line.rstrip() for line in lines if line.strip() and not line.startswith(_NO_REASONS)]
    errors = [line for line in lines if line.startswith(("ERROR", "error:"))]
    whole = [line for line in lines if not line.startswith((" ", "\t"))]
    text = " | ".join((errors or whole or lines)[-_SHOWN_LINES:])
    return text[-_SHOWN_CHARACTERS:] or "it failed without a word"


def clean_environment() -> dict[str, str]:
    """This process's environment without what would lead another Python to our packages."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON") and name != "VIRTUAL_ENV"
    }
