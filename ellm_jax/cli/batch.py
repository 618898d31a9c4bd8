"""`ellm batch`: an OpenAI batch file in, its results out."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import queue
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tqdm import tqdm

from ellm_jax.batch_file import (
    LINE_START,
    BadLine,
    BatchRequest,
    failure_line,
    line_id_of,
    line_key,
    parse_line,
    success_line,
)
from ellm_jax.cli import options
from ellm_jax.cli.console import Failure, note, plain_errors, write_json
from ellm_jax.outputs import RequestOutput
from ellm_jax.sampling import SamplingParams

if TYPE_CHECKING:
    from ellm_jax.engine import Engine

_EXAMPLES = """\
examples:
  ellm batch requests.jsonl answers.jsonl --model ./my-model
  ellm batch requests.jsonl answers.jsonl --model ./my-model --device-memory 8GiB --max-tokens 300

A line of the input:
  {"custom_id": "a1", "method": "POST", "url": "/v1/chat/completions",
   "body": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50}}
or with "url": "/v1/completions" and a "prompt" (a text, or token ids) in the body.

Results are written as they finish. Run the same command again to go on after an interruption:
what OUT has is not run again. A line that cannot be run becomes a result with status_code 400, or
500 where it failed while it ran, and does not stop the rest: once every line has its result the
exit code is 0, and the number of those that failed is said on stderr, even with --quiet.

Sampling options are for what a body leaves out. The fields model, user, metadata, store and
service_tier are ignored; unknown ones are an error of the line.
"""

_AHEAD = 2
"""Requests that the engine is given, as a multiple of those that run at once."""


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "batch",
        help="run an OpenAI batch file",
        description="Runs the requests of an OpenAI batch file (JSONL) and writes their results.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="IN.jsonl", help="requests, one per line")
    parser.add_argument("output", metavar="OUT.jsonl", help="results; appended to if it exists")
    options.add_model_option(parser)
    parser.add_argument(
        "--served-name", metavar="NAME", help="the model name in results (default: its directory)"
    )
    parser.add_argument("--json", action="store_true", help="write a summary as JSON at the end")
    options.add_sampling_options(
        parser,
        leave_out=("n", "logprobs", "prompt_logprobs", "logit_bias", "structured"),
        max_tokens=256,
    )
    options.add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ellm_jax.engine import Engine

    source, target = Path(args.input), Path(args.output)
    _check_paths(source, target)
    with plain_errors():
        options.sampling_params(args, max_tokens=256)
        config = options.engine_config(args)
    defaults = {"max_tokens": 256, **options.given_fields(args, SamplingParams)}
    with source.open("rb") as file:
        total = sum(1 for line in file if line.strip())
    name = args.served_name or (Path(args.model).resolve().name if args.model else "ellm-tiny")
    with _appending(target) as out:
        done = _repair(target)
        with plain_errors():
            engine = Engine.from_pretrained(args.model, config)
        with engine:
            bar = tqdm(total=total, desc="Batch", unit="req", disable=not config.progress)
            job = _Job(engine, out, done, defaults, name, bar)
            with bar:
                job.run(source, _AHEAD * config.max_num_seqs)
    summary = job.summary()
    if args.json:
        write_json(summary)
    else:
        text = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in summary.items())
        note(f"{target}: {text}", quiet=not config.progress)
    if job.failed:
        note(f"ellm: {job.failed} of {total} lines failed; {target} says why")
    return 0


def _check_paths(source: Path, target: Path) -> None:
    if not source.is_file():
        raise Failure(f"{source} is not a file; give a file with a request per line")
    if target.exists() and (not target.is_file() or target.samefile(source)):
        raise Failure(f"{target} cannot take the results; give another path")
    if not target.parent.is_dir():
        raise Failure(f"the directory {target.parent} does not exist; make it first")


@contextlib.contextmanager
def _appending(target: Path) -> Iterator[BinaryIO]:
    """The output, for this process alone: two that wrote would run every line twice."""
    with target.open("ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Failure(
                f"{target} is being written by another process; wait for its end, or give another "
                "path"
            ) from error
        except OSError:
            # A file system that knows no locks: it works, unprotected.
            note(f"ellm: {target} cannot be locked; let no other process write it meanwhile")
        yield out


def _repair(target: Path) -> set[str]:
    """What the output has already; cuts off a last line that was not written to its end."""
    keys: set[str] = set()
    whole_bytes = 0
    with target.open("r+b") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                start = LINE_START.encode()
                if line[: len(start)] != start[: len(line)]:
                    raise _no_output(target, number)
                break
            try:
                keys.add(line_key(line.decode("utf-8", errors="replace")))
            except BadLine as error:
                raise _no_output(target, number) from error
            whole_bytes += len(line)
        file.truncate(whole_bytes)
    return keys


def _no_output(target: Path, number: int) -> Failure:
    return Failure(
        f"{target}, line {number} is no result of a batch; nothing was written. Give the file that "
        "an earlier run wrote, or a new one"
    )


class _Job:
    """Moves requests from the input through the engine to the output, a bounded number at once.

    Attributes:
        completed, failed, skipped, duplicates: counts of lines.
    """

    def __init__(
        self,
        engine: Engine,
        out: BinaryIO,
        done: set[str],
        defaults: dict[str, Any],
        name: str,
        bar: tqdm,
    ):
        """`done` are the keys of results that `out` has; `defaults` are sampling fields."""
        self._engine, self._out, self._done, self._defaults = engine, out, done, defaults
        self._name, self._bar = name, bar
        self._seen: set[str] = set()
        self._over: queue.SimpleQueue[tuple[BatchRequest, str, Future[RequestOutput]]]
        self._over = queue.SimpleQueue()
        self._running = 0
        self._tokens = 0
        self._begin_s = time.monotonic()
        self.completed = self.failed = self.skipped = self.duplicates = 0

    def run(self, source: Path, most: int) -> None:
        """Runs the whole input, `most` requests in the engine at a time."""
        with source.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._take(number, line)
                while self._running >= most or (self._running and not self._over.empty()):
                    self._settle()
        while self._running:
            self._settle()

    def summary(self) -> dict[str, int]:
        """The counts."""
        return {
            "completed": self.completed,
            "failed": self.failed,
            "skipped": self.skipped,
            "duplicates": self.duplicates,
            "output_tokens": self._tokens,
        }

    def _take(self, number: int, line: bytes) -> None:
        """Submits a line of the input, or writes at once what is wrong with it."""
        line_id = line_id_of(number)
        try:
            request = parse_line(line, self._defaults)
        except BadLine as error:
            if not self._known(error.custom_id or line_id, number):
                self._refuse(error.custom_id, line_id, str(error))
            return
        if self._known(request.custom_id, number):
            return
        from ellm_jax.engine import EngineClosed

        with plain_errors():
            try:
                future = self._engine.submit(request.prompt, request.params)
            except (EngineClosed, MemoryError):
                raise
            except Exception as error:  # whatever a line makes happen is the line's alone
                self._refuse(request.custom_id, line_id, str(error) or type(error).__name__)
                return
        self._running += 1
        future.add_done_callback(lambda over: self._over.put((request, line_id, over)))

    def _known(self, key: str, number: int) -> bool:
        """Whether the output has this, or an earlier line of the input asked for it."""
        if key in self._seen:
            self.duplicates += 1
            note(f"ellm: line {number}: custom_id {key!r} was used before; the line is left out")
        elif key in self._done:
            self.skipped += 1
        else:
            self._seen.add(key)
            return False
        self._seen.add(key)
        self._bar.update()
        return True

    def _refuse(self, custom_id: str | None, line_id: str, message: str) -> None:
        self.failed += 1
        self._write(failure_line(custom_id, message, line_id=line_id))

    def _settle(self) -> None:
        """Writes the next result."""
        request, line_id, future = self._over.get()
        self._running -= 1
        with plain_errors():
            output = future.result()
        errors = [c.error for c in output.outputs if c.finish_reason == "error"]
        if errors:
            self.failed += 1
            message = errors[0] or "the request failed"
            line = failure_line(request.custom_id, message, line_id=line_id, status=500)
        else:
            self.completed += 1
            self._tokens += sum(len(completion.token_ids) for completion in output.outputs)
            line = success_line(
                request,
                output,
                line_id=line_id,
                model=self._name,
                created=int(time.time()),
                decoder=self._engine.tokenizer,
            )
        self._write(line)

    def _write(self, line: str) -> None:
        self._out.write(line.encode() + b"\n")
        self._out.flush()
        speed = self._tokens / max(1e-9, time.monotonic() - self._begin_s)
        self._bar.set_postfix_str(f"{speed:.1f} tok/s, {self.failed} failed", refresh=False)
        self._bar.update()
