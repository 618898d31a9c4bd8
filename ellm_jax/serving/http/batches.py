"""Batches: begun, ended, and gone on with after a restart; `batch_run` runs one."""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http import chat as _chat
from ellm_jax.serving.http import completions as _completions
from ellm_jax.serving.http import replies
from ellm_jax.serving.http.batch_run import BadBatch, BatchRun, EngineGone
from ellm_jax.serving.http.body import decode
from ellm_jax.serving.http.context import Caller, Context, new_id
from ellm_jax.serving.http.errors import HttpError
from ellm_jax.serving.http.files import OVER, FileStore, StoredBatch
from ellm_jax.serving.http.requests import BatchCreate, BatchLine, Common
from ellm_jax.serving.tenants import Tenant
from ellm_jax.serving.turns import Turns

PRIORITY = 10
"""Of a batch's requests: those of people who wait go first."""

_SEATS_SHARE = 0.75
"""What lines of all batches together take of the engine's seats, at most: whoever waits for an
answer finds one free."""
_RETRY_S = 1.0
_DAY_S = 86400
_LATER = (ErrorKind.OVERLOADED, ErrorKind.UNAVAILABLE)
_log = logging.getLogger(__name__)


class Batches:
    """Belongs to one event loop. A batch that a stopped server left goes on when it is back."""

    def __init__(
        self,
        context: Context,
        store: FileStore,
        completions: _completions.Completions,
        chat: _chat.Chat,
    ):
        """Args:
        context, store: as the routes use them.
        completions, chat: answer the lines.
        """
        self._context, self._store = context, store
        self._completions, self._chat = completions, chat
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._seats = max(1, int(_SEATS_SHARE * context.service.model.max_num_seqs))
        self._seat = asyncio.Semaphore(self._seats)
        self._turns = Turns()

    async def start(self) -> None:
        """Goes on with what is not over."""
        for stored in self._store.batches():
            if stored.batch.status not in OVER:
                self._begin(stored)

    async def stop(self) -> None:
        """Stops where it is."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def create(self, tenant: Tenant, asked: BatchCreate) -> replies.Batch:
        """Begins a batch.

        Raises:
            ServiceError: the tenant has too much, or too many that are not over.
        """
        now = int(time.time())
        batch = replies.Batch(
            id=new_id("batch"),
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            completion_window=asked.completion_window,
            status="validating",
            created_at=now,
            expires_at=now + _DAY_S,
            request_counts=replies.RequestCounts(),
            metadata=asked.metadata,
        )
        self._store.check_room(tenant)
        made: list[replies.FileObject] = []
        try:
            for name in ("output", "error"):
                filename = f"{batch.id}_{name}.jsonl"
                made.append(self._store.create(tenant, filename, "batch_output"))
            self._store.make_room_for_batch(tenant)
            stored = StoredBatch(tenant.name, tenant.admin, batch, *made)
            self._store.put_batch(stored)
        except BaseException:
            for file in made:
                self._store.discard(file)
            raise
        self._begin(stored)
        return batch

    def cancel(self, stored: StoredBatch) -> replies.Batch:
        """Ends a batch; what it has done stays.

        Raises:
            ServiceError: it is over.
        """
        batch = stored.batch
        if batch.status in OVER:
            raise ServiceError(ErrorKind.INVALID, f"the batch is {batch.status} already")
        if batch.status != "cancelling":
            batch.status, batch.cancelling_at = "cancelling", int(time.time())
            self._store.put_batch(stored)
            if (task := self._tasks.get(batch.id)) is not None:
                task.cancel()
            else:
                self._begin(stored)  # the engine has failed meanwhile
        return batch

    def _begin(self, stored: StoredBatch) -> None:
        task = asyncio.ensure_future(self._run(stored))
        self._tasks[stored.batch.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(stored.batch.id, None))

    async def _run(self, stored: StoredBatch) -> None:
        batch = stored.batch
        try:
            if batch.status != "cancelling":
                await BatchRun(
                    self._store,
                    stored,
                    self._answer,
                    max_line_bytes=self._context.config.max_body_bytes,
                    workers=self._seats,
                    turns=self._turns,
                ).run()
        except asyncio.CancelledError:
            if batch.status != "cancelling":
                raise  # the server stops; the batch goes on when it is back
        except EngineGone:
            if batch.status != "cancelling":
                self._store.put_batch(stored)  # goes on with the next server
                return
        except BadBatch as error:
            batch.errors = replies.BatchErrors(error.errors)
            batch.status, batch.failed_at = "failed", int(time.time())
        except Exception:
            _log.exception("batch %s failed", batch.id)
            failed = replies.BatchError("server_error", "the server failed; its log says why")
            batch.errors = replies.BatchErrors([failed])
            batch.status, batch.failed_at = "failed", int(time.time())
        now = int(time.time())
        if batch.status == "cancelling":
            batch.status, batch.cancelled_at = "cancelled", now
        elif batch.status == "finalizing":
            batch.status, batch.completed_at = "completed", now
        batch.output_file_id = self._keep(stored, stored.output)
        batch.error_file_id = self._keep(stored, stored.errors)
        self._store.put_batch(stored)

    def _keep(self, stored: StoredBatch, file: replies.FileObject) -> str | None:
        """Makes a file of results known; its id, or None where it is empty."""
        added = self._store.add(Tenant(stored.tenant, stored.admin), file)
        if added.bytes:
            return added.id
        self._store.delete(Tenant(stored.tenant, stored.admin), file.id)
        return None

    async def _answer(self, line: BatchLine, tenant: Tenant) -> msgspec.Struct:
        """The answer to a line, once the server has room for it.

        Raises:
            HttpError, ServiceError: the line was refused, or failed.
            EngineGone: neither this line nor any other can be answered any more.
        """
        caller = Caller(tenant, priority=PRIORITY)
        while True:
            if not self._context.service.live:
                raise EngineGone
            try:
                async with self._seat:
                    if line.url == "/v1/chat/completions":
                        chat = decode(line.body, _chat.DECODER)
                        _check_whole(chat)
                        return await self._chat.answer(chat, caller)
                    text = decode(line.body, _completions.DECODER)
                    _check_whole(text)
                    return await self._completions.answer(text, caller)
            except ServiceError as error:
                if error.kind not in (*_LATER, ErrorKind.INTERNAL):
                    raise
                # Also lets it be known whether it was the engine that failed.
                await asyncio.sleep(error.retry_after_s or _RETRY_S)
                if error.kind is ErrorKind.INTERNAL and self._context.service.live:
                    raise
            except HttpError:
                raise
            except Exception as error:
                if self._context.service.live:
                    raise
                raise EngineGone from error


def _check_whole(asked: Common) -> None:
    if asked.stream:
        raise HttpError(400, "in a batch nothing is streamed; leave stream out", param="stream")
