"""Several calls at once, as one: all of their answers, or their updates as they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol

from ellm_jax.outputs import RequestOutput, RequestUpdate
from ellm_jax.serving.call import Call
from ellm_jax.serving.http import replies
from ellm_jax.serving.http.context import Tally
from ellm_jax.serving.http.event_stream import DONE
from ellm_jax.serving.service import Service
from ellm_jax.serving.stream import RequestStream

_AHEAD = 8
"""Updates of all streams together that wait for a slow reader; what comes then is merged."""


class Writer(Protocol):
    """Makes events of updates."""

    def write(self, number: int, update: RequestUpdate) -> bytes:
        """The events for an update of a call; empty where there is nothing to say yet."""
        ...

    def usage(self, usage: replies.Usage) -> bytes:
        """The event that counts tokens."""
        ...


async def complete_all(service: Service, calls: Sequence[Call]) -> list[RequestOutput]:
    """Completes calls, all or none: where one fails, the others are ended.

    Raises:
        ServiceError: of the first that failed.
    """
    if len(calls) == 1:
        return [await service.complete(calls[0])]
    tasks = [asyncio.ensure_future(service.complete(call)) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def events(
    service: Service, calls: Sequence[Call], writer: Writer, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The events of calls, from the first to the last that says it is the last.

    Raises:
        ServiceError: a call was refused, or failed; the others are ended.
    """
    tally = Tally()
    async with contextlib.AsyncExitStack() as stack:
        streams = []
        for call in calls:
            streams.append(await stack.enter_async_context(await service.open(call)))
        async with contextlib.aclosing(_merged(streams)) as updates:
            async for number, update in updates:
                for delta in update.deltas:
                    tally.completion_tokens += len(delta.token_ids)
                data = writer.write(number, update)
                if data:
                    yield data
        for stream in streams:
            tally.prompt_tokens += len(stream.prompt_token_ids)
            tally.cached_tokens += stream.metrics.cached_tokens
    yield (writer.usage(tally.usage) if include_usage else b"") + DONE


async def _merged(
    streams: Sequence[RequestStream],
) -> AsyncGenerator[tuple[int, RequestUpdate], None]:
    """The updates of streams as they come, with the number of the stream."""
    if len(streams) == 1:
        async for alone in streams[0]:
            yield 0, alone
        return
    queue: asyncio.Queue[tuple[int, RequestUpdate | Exception | None]] = asyncio.Queue(_AHEAD)

    async def pump(number: int, stream: AsyncIterator[RequestUpdate]) -> None:
        try:
            async for update in stream:
                await queue.put((number, update))
            await queue.put((number, None))
        except Exception as error:
            await queue.put((number, error))

    tasks = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            number, update = await queue.get()
            if isinstance(update, Exception):
                raise update
            if update is None:
                left -= 1
            else:
                yield number, update
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Future[RequestOutput] | asyncio.Future[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
