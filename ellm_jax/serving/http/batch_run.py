"""Runs one batch: checks its file, has its lines answered, and writes down what comes."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import BinaryIO

import msgspec

from ellm_jax.serving.errors import ServiceError
from ellm_jax.serving.http import replies
from ellm_jax.serving.http.errors import HttpError, answer_of
from ellm_jax.serving.http.files import FileStore, StoredBatch
from ellm_jax.serving.http.requests import BatchLine
from ellm_jax.serving.tenants import Tenant

MAX_LINES = 50_000
"""Most requests of one batch."""

_ERRORS_MAX = 20
_WORKERS = 16
_SAVE_EVERY = 32  # lines between two records of how far a batch is
_LINE = msgspec.json.Decoder(BatchLine)

Answer = Callable[[BatchLine, Tenant], Awaitable[msgspec.Struct]]


class BadBatch(Exception):  # named after what the caller has in hand
    """A file that cannot be run.

    Attributes:
        errors: what is wrong, line by line.
    """

    def __init__(self, errors: list[replies.BatchError]):
        super().__init__(errors[0].message)
        self.errors = errors


class BatchRun:
    """One run of a batch, which may have been begun before."""

    def __init__(self, store: FileStore, stored: StoredBatch, answer: Answer, max_line_bytes: int):
        """Args:
        store: has the files.
        stored: the batch; its state is kept there.
        answer: answers a line.
        max_line_bytes: most bytes of a line.
        """
        self._store, self._stored, self._answer = store, stored, answer
        self._max_line_bytes = max_line_bytes
        self._tenant = Tenant(stored.tenant, stored.admin)
        self._unsaved = 0

    async def run(self) -> None:
        """Runs it to its end: the batch is then "finalizing".

        Raises:
            BadBatch: the file cannot be run, or is not there any more; nothing was.
        """
        batch, counts = self._stored.batch, self._stored.batch.request_counts
        try:
            path_id = self._store.get(self._tenant, batch.input_file_id).id
        except ServiceError as error:
            raise BadBatch([replies.BatchError("no_file", error.message)]) from error
        counts.total = await asyncio.to_thread(self._check, path_id)
        done = await asyncio.to_thread(self._done)
        if batch.in_progress_at is None:
            batch.in_progress_at = int(time.time())
        batch.status = "in_progress"
        self._store.put_batch(self._stored)
        with (
            self._store.open(path_id, "rb") as source,
            self._store.open(self._stored.output.id, "ab") as output,
            self._store.open(self._stored.errors.id, "ab") as errors,
        ):
            lines = self._lines(source, done)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(_WORKERS, counts.total)):
                    group.create_task(self._work(lines, output, errors))
        batch.status, batch.finalizing_at = "finalizing", int(time.time())

    def _check(self, file_id: str) -> int:
        """The number of requests in a file."""
        wrong: list[replies.BatchError] = []
        seen: set[str] = set()

        def note(code: str, message: str, line: int) -> None:
            wrong.append(replies.BatchError(code, message, line=line))

        with self._store.open(file_id, "rb") as source:
            for number, line in enumerate(_bounded_lines(source, self._max_line_bytes), 1):
                if len(wrong) >= _ERRORS_MAX:
                    break
                if line is None:
                    note("too_large", f"a line has over {self._max_line_bytes} bytes", number)
                    break
                if not line.strip():
                    continue
                try:
                    request = _LINE.decode(line)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    note("invalid_json_line", f"the line is no request: {error}", number)
                    continue
                if request.url != self._stored.batch.endpoint or request.method != "POST":
                    note("mismatched_endpoint", "url is not the batch's endpoint by POST", number)
                if request.custom_id in seen:
                    note("duplicate_custom_id", f"{request.custom_id!r} was used before", number)
                seen.add(request.custom_id)
                if len(seen) > MAX_LINES:
                    note("too_many_tasks", f"a batch may have {MAX_LINES} requests", number)
                    break
        if not seen and not wrong:
            wrong.append(replies.BatchError("empty_file", "the file has no requests"))
        if wrong:
            raise BadBatch(wrong)
        return len(seen)

    def _done(self) -> set[str]:
        """The lines that an earlier run has answered; cuts off what it did not write to its end."""
        done: set[str] = set()
        counts = self._stored.batch.request_counts
        found = []
        for file in (self._stored.output, self._stored.errors):
            whole_bytes = count = 0
            with self._store.open(file.id, "a+b") as target:
                target.seek(0)
                for line in target:
                    if not line.endswith(b"\n"):
                        break
                    done.add(json.loads(line)["custom_id"])
                    whole_bytes += len(line)
                    count += 1
                target.truncate(whole_bytes)
            found.append(count)
        counts.completed, counts.failed = found
        return done

    def _lines(self, source: BinaryIO, done: set[str]) -> Iterator[BatchLine]:
        for line in source:
            if line.strip():
                request = _LINE.decode(line)
                if request.custom_id not in done:
                    yield request

    async def _work(self, lines: Iterator[BatchLine], output: BinaryIO, errors: BinaryIO) -> None:
        """Answers lines until there are no more."""
        counts = self._stored.batch.request_counts
        for line in lines:
            try:
                body, status = await self._answer(line, self._tenant), 200
            except (ServiceError, HttpError) as error:
                told = answer_of(error)
                body, status = replies.ErrorReply(told.error), told.status
            response = replies.LineResponse(status, f"req_{uuid.uuid4().hex}", body)
            line_id = f"batch_req_{uuid.uuid4().hex}"
            result = replies.LineResult(line_id, line.custom_id, response)
            target = output if status == 200 else errors
            target.write(msgspec.json.encode(result) + b"\n")
            target.flush()
            if status == 200:
                counts.completed += 1
            else:
                counts.failed += 1
            self._unsaved += 1
            if self._unsaved >= _SAVE_EVERY:
                self._unsaved = 0
                self._store.put_batch(self._stored)


def _bounded_lines(source: BinaryIO, most_bytes: int) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long, and then no more."""
    while line := source.readline(most_bytes + 1):
        if len(line) > most_bytes:
            yield None
            return
        yield line
