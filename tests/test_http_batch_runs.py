"""Runs of batches by hand: what they do to the event loop, and what ends them."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ellm_jax.serving.http import replies
from ellm_jax.serving.http.batch_run import BadBatch, BatchRun, EngineGone
from ellm_jax.serving.http.errors import HttpError
from ellm_jax.serving.http.files import FileStore, StoredBatch
from ellm_jax.serving.http.requests import BatchLine
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.tenants import Tenant
from ellm_jax.serving.turns import Turns

RED = Tenant("red")
Answer = Callable[[BatchLine, Tenant], Awaitable[msgspec.Struct]]


class Made:
    """A batch of so many lines in a directory."""

    def __init__(self, directory: Path, lines: int, **config: Any):
        self.store = FileStore(ServeConfig(files_dir=str(directory), **config))
        file = self.store.create(RED, "in.jsonl", "batch")
        with self.store.open(file.id, "wb") as target:
            for i in range(lines):
                line = {"custom_id": str(i), "url": "/v1/completions", "method": "POST", "body": {}}
                target.write(json.dumps(line).encode() + b"\n")
        self.store.add(RED, file)
        batch = replies.Batch(
            id=f"batch-{0:032x}",
            endpoint="/v1/completions",
            input_file_id=file.id,
            completion_window="24h",
            status="validating",
            created_at=0,
            expires_at=0,
            request_counts=replies.RequestCounts(),
            metadata=None,
        )
        made = [self.store.create(RED, name, "batch_output") for name in ("output", "errors")]
        self.stored = StoredBatch("red", False, batch, *made)
        self.store.put_batch(self.stored)

    def run(self, answer: Answer, workers: int = 4) -> BatchRun:
        return BatchRun(
            self.store, self.stored, answer, max_line_bytes=1000, workers=workers, turns=Turns()
        )

    def results(self, file: replies.FileObject) -> dict[str, int]:
        with self.store.open(file.id, "rb") as source:
            lines = [json.loads(line) for line in source]
        return {line["custom_id"]: line["response"]["status_code"] for line in lines}


async def fine(line: BatchLine, tenant: Tenant) -> msgspec.Struct:
    return replies.Deleted("x" * 100)


def test_lines_that_are_refused_at_once_leave_turns_to_others(tmp_path):
    made = Made(tmp_path, 500)

    async def refuse(line: BatchLine, tenant: Tenant) -> msgspec.Struct:
        seen.append(iteration)
        raise HttpError(400, "no")

    async def main() -> None:
        def count() -> None:
            nonlocal iteration
            iteration += 1
            loop.call_soon(count)

        loop = asyncio.get_running_loop()
        loop.call_soon(count)
        await asyncio.wait_for(made.run(refuse).run(), 60)

    iteration = 0
    seen: list[int] = []
    asyncio.run(main())
    assert len(seen) == 500
    assert len(set(seen)) == 500, "two lines began in one iteration of the event loop"
    assert made.stored.batch.request_counts.failed == 500


def test_so_many_lines_are_answered_at_a_time(tmp_path):
    made = Made(tmp_path, 100)
    busy = most = 0

    async def slow(line: BatchLine, tenant: Tenant) -> msgspec.Struct:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.05)
        busy -= 1
        return await fine(line, tenant)

    asyncio.run(made.run(slow, workers=40).run())
    assert most == 40


def test_a_line_that_fails_for_any_reason_is_only_one(tmp_path, caplog):
    made = Made(tmp_path, 20)

    async def odd(line: BatchLine, tenant: Tenant) -> msgspec.Struct:
        if line.custom_id == "7":
            raise TypeError("odd")
        return await fine(line, tenant)

    asyncio.run(made.run(odd).run())
    assert made.results(made.stored.errors) == {"7": 500}
    assert len(made.results(made.stored.output)) == 19
    assert "odd" in caplog.text


def test_an_engine_that_is_gone_leaves_lines_for_later(tmp_path):
    made = Made(tmp_path, 50)
    left = 10

    async def gone(line: BatchLine, tenant: Tenant) -> msgspec.Struct:
        nonlocal left
        left -= 1
        if left < 0:
            raise EngineGone
        return await fine(line, tenant)

    with pytest.raises(EngineGone):
        asyncio.run(made.run(gone).run())
    assert made.stored.batch.status == "in_progress"
    assert len(made.results(made.stored.output)) == 10
    asyncio.run(made.run(fine).run())
    assert made.stored.batch.status == "finalizing"
    assert set(made.results(made.stored.output)) == {str(i) for i in range(50)}
    assert made.results(made.stored.errors) == {}


def test_results_without_room_end_a_batch(tmp_path):
    made = Made(tmp_path, 200, max_tenant_file_bytes=30_000)
    with pytest.raises(BadBatch) as error:
        asyncio.run(made.run(fine).run())
    assert error.value.errors[0].code == "no_room"
    assert 0 < len(made.results(made.stored.output)) < 200
