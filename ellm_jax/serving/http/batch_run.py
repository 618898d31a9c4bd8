"""Runs one batch: checks its file, has its lines answered, and writes down what comes."""

from __future__ import annotations

import asyncio
import json
import logging
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
from ellm_jax.serving.turns import Turns

MAX_LINES = 50_000
"""Most requests of one batch."""

_ERRORS_MAX = 20
_SAVE_EVERY = 32  # lines between two records of how far a batch is
_LINE = msgspec.json.Decoder(BatchLine)
_log = logging.getLogger(__name__)

Answer = Callable[[BatchLine, Tenant], Awaitable[msgspec.Struct]]


class BadBatch(Exception):  # named after what the caller has in hand
    """A file that cannot be run.

    Attributes:
        errors: what is wrong, line by line.
    """

    def __init__(self, errors: list[replies.BatchError]):
        super().__init__(errors[0].message)
        self.errors = errors


class EngineGone(Exception):  # named after what has happened
    """The engine has failed: the rest of a batch is for the server that is started next."""


class BatchRun:
    """One run of a batch, which may have been begun before."""

    def __init__(
        self,
        store: FileStore,
        stored: StoredBatch,
        answer: Answer,
        *,
        max_line_bytes: int,
        workers: int,
        turns: Turns,
    ):
        """Args:
        store: has the files.
        stored: the batch; its state is kept there.
        answer: answers a line; raises EngineGone once no line can be answered any more.
        max_line_bytes: most bytes of a line.
        workers: most lines that are answered at a time.
        turns: one line of all batches begins per iteration of the event loop.
        """
        self._store, self._stored, self._answer = store, stored, answer
        self._max_line_bytes, self._workers, self._turns = max_line_bytes, workers, turns
        self._tenant = Tenant(stored.tenant, stored.admin)
        self._unsaved = 0
        self._end: BadBatch | EngineGone | None = None

    async def run(self) -> None:
        """Runs it to its end: the batch is then "finalizing".

        Raises:
            BadBatch: the file cannot be run, or is not there any more; or there is no room for
                the results.
            EngineGone: the engine has failed.
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
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._workers, counts.total)):
                    group.create_task(self._work(source, done, output, errors))
        if self._end is not None:
            raise self._end
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

    async def _work(
        self, source: BinaryIO, done: set[str], output: BinaryIO, errors: BinaryIO
    ) -> None:
        """Answers lines until there are no more, or it makes no sense any more."""
        while self._end is None:
            await self._turns.wait()
            if not (text := source.readline()):
                return
            if not text.strip():
                continue
            line = _LINE.decode(text)
            if line.custom_id in done:
                continue
            try:
                body, status = await self._answer_or_error(line)
            except EngineGone as error:
                self._end = error
                return
            self._write(line, body, status, output if status == 200 else errors)

    async def _answer_or_error(self, line: BatchLine) -> tuple[msgspec.Struct, int]:
        try:
            return await self._answer(line, self._tenant), 200
        except EngineGone:
            raise
        except (ServiceError, HttpError) as error:
            told = answer_of(error)
        except Exception:
            batch_id = self._stored.batch.id
            _log.exception("batch %s: the line %r failed", batch_id, line.custom_id)
            told = answer_of(HttpError(500, "the server failed; its log says why, by the batch"))
        return replies.ErrorReply(told.error), told.status

    def _write(self, line: BatchLine, body: msgspec.Struct, status: int, target: BinaryIO) -> None:
        """Writes down what came of a line."""
        response = replies.LineResponse(status, f"req_{uuid.uuid4().hex}", body)
        result = replies.LineResult(f"batch_req_{uuid.uuid4().hex}", line.custom_id, response)
        target.write(msgspec.json.encode(result) + b"\n")
        target.flush()
        counts = self._stored.batch.request_counts
        if status == 200:
            counts.completed += 1
        else:
            counts.failed += 1
        self._unsaved += 1
        if self._unsaved >= _SAVE_EVERY:
            self._unsaved = 0
            self._store.put_batch(self._stored)
            try:
                self._store.check_room(self._tenant)
            except ServiceError as error:
                self._end = BadBatch([replies.BatchError("no_room", error.message)])


def _bounded_lines(source: BinaryIO, most_bytes: int) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long, and then no more."""
    while line := source.readline(most_bytes + 1):
        if len(line) > most_bytes:
            yield None
            return
        yield line
