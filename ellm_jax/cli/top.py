"""`ellm top`: a server's memory, queues and latencies, live in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from typing import Any

from ellm_jax.cli.console import Failure, write_json

KEY_VARIABLE = "ELLM_API_KEY"
"""The environment variable that holds the key, where none is named on the command line."""

_EXAMPLES = """\
examples:
  ellm top                                    the server at http://127.0.0.1:8000
  ellm top https://llm.example:8000 --key-file key.txt
  ELLM_API_KEY=... ellm top --once            one look, without taking over the terminal
  ellm top --once --json                      for scripts

The key may be any tenant's. Ctrl-C ends it.
"""
_HISTORY = 240
_TIMEOUT_S = 5.0
_REPLY_BYTES_MAX = 8 * 2**20
_FIELDS = {"number", "time_s", "limit_bytes", "device", "host_limit_bytes", "host_used_bytes"}
_FIELDS |= {"running", "waiting", "queued", "offloaded", "moving", "moves", "asleep"}
_FIELDS |= {"prompt_tokens_per_s", "output_tokens_per_s", "ttft_ms", "tpot_ms"}
"""What is read of a snapshot."""


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "top",
        help="watch a server: memory by owner, requests, latencies",
        description="Shows what a running server does, every second.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "url",
        nargs="?",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="the server's address (default: %(default)s)",
    )
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        help=f"file with the key (default: what {KEY_VARIABLE} holds, if it is set)",
    )
    parser.add_argument(
        "--ca", metavar="FILE", help="certificates, in PEM, of who vouches for the server"
    )
    parser.add_argument("--once", action="store_true", help="look once and end")
    parser.add_argument("--json", action="store_true", help="write snapshots as lines of JSON")
    parser.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="time between two looks (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if not 0.1 <= args.interval <= 3600:
        raise Failure(f"--interval {args.interval:g}: must be from 0.1 to 3600 seconds")
    server = _Server(args.url, _key(args.key_file), args.ca)
    if args.json:
        return _write(server, args.interval, once=args.once)
    # Only here: what writes JSON does without it.
    try:
        from rich.console import Console
        from rich.live import Live
    except ModuleNotFoundError as error:
        raise Failure("rich is missing; pip install 'ellm-jax[serve]', or use --json") from error
    from ellm_jax.cli.top_view import view

    history: deque[dict[str, Any]] = deque(maxlen=_HISTORY)
    status = server.status(0, _HISTORY)
    history.extend(status["snapshots"])
    started_s = status["started_s"]
    console = Console()
    if args.once:
        console.print(view(status, history, console.width))
        return 0
    # Ctrl-C is how one leaves.
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True) as live:
        problem = ""
        while True:
            live.update(view(status, history, console.width, problem), refresh=True)
            time.sleep(args.interval)
            try:
                status = server.status(history[-1]["number"] if history else 0, _HISTORY)
                if status["started_s"] != started_s:
                    # Another one, whose numbers begin anew.
                    started_s = status["started_s"]
                    history.clear()
                    status = server.status(0, _HISTORY)
                history.extend(status["snapshots"])
                problem = ""
            except Failure as failure:
                problem = str(failure)
    return 0


def _write(server: _Server, interval_s: float, *, once: bool) -> int:
    number = 0
    while True:
        status = server.status(number, 1 if once or not number else _HISTORY)
        for snapshot in status.pop("snapshots"):
            number = snapshot["number"]
            write_json({**status, **snapshot})
        if once:
            return 0
        time.sleep(interval_s)


def _key(path: str | None) -> str | None:
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"--key-file {path} cannot be read: {error}") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """No other server gets the key."""


class _Server:
    """Asks a server for its snapshots."""

    def __init__(self, url: str, key: str | None, ca: str | None):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise Failure(f"{url!r} is no address of a server; write http://HOST:PORT")
        self._url = url.rstrip("/")
        self._headers = {"user-agent": "ellm-top"}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        try:
            context = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise Failure(f"--ca {ca} holds no certificates: {error}") from error
        handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def status(self, since: int, most: int) -> dict[str, Any]:
        """What the server says of itself, with its snapshots after number `since`.

        Raises:
            Failure: it does not answer, or not with that.
        """
        url = f"{self._url}/dashboard/snapshots?since={since}&most={most}"
        request = urllib.request.Request(url, headers=self._headers)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as reply:
                found = json.loads(reply.read(_REPLY_BYTES_MAX))
            missing = {"model", "started_s", "snapshots"} - found.keys()
            for snapshot in found.get("snapshots", ()):
                missing |= _FIELDS - snapshot.keys()
            if missing:
                raise ValueError(f"its answer has no {', '.join(sorted(missing))}")
        except urllib.error.HTTPError as error:
            raise Failure(_refusal(self._url, error), exit_code=1) from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise Failure(
                f"{self._url} does not answer ({reason}); is `ellm serve` running there?", 1
            ) from error
        except (ValueError, AttributeError, TypeError) as error:
            raise Failure(
                f"{self._url} is no server of this version: {error}", exit_code=1
            ) from error
        return dict(found)


def _refusal(url: str, error: urllib.error.HTTPError) -> str:
    if error.code == 401:
        return f"{url} wants a key; put one into {KEY_VARIABLE}, or a file with it: --key-file FILE"
    if error.code == 404:
        return f"{url} has no snapshots; is it a server of `ellm serve`?"
    message = ""
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
        message = f": {json.loads(error.read(65536))['error']['message']}"
    return f"{url} answers with status {error.code}{message}"
