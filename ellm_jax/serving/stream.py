"""The way of one call's output from the engine to whoever reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ellm_jax.intake import Group
from ellm_jax.outputs import RequestMetrics, RequestOutput, RequestUpdate
from ellm_jax.progress import ProgressReader
from ellm_jax.serving.call import Call
from ellm_jax.serving.errors import ServiceError


class RequestStream:
    """What a call gives, as it comes: an asynchronous iterator of updates, each part once. What a
    slow reader misses is part of the next update. Has to be closed; `async with` does. Closing it
    before its end aborts the request and frees its memory. Lives on the event loop.

    Attributes:
        call: what was asked.
        group: the engine's requests for it.
        first_token_told, end_told: what the observer knows; the service's.
    """

    def __init__(
        self,
        call: Call,
        group: Group,
        close: Callable[[RequestStream], None],
        partial: bool = True,
    ):
        """Args:
        call, group: see above.
        close: called once, when nobody reads any more.
        partial: whether there are updates before the end.
        """
        self.call = call
        self.group = group
        self._reader = ProgressReader(group)
        self._close = close
        self._news = False
        self._waiter: asyncio.Future[None] | None = None
        self._error: ServiceError | None = None
        self._whole = False  # nothing comes any more
        self._ended = False  # and that was read
        self._closed = False
        self._partial = partial
        self.first_token_told = False
        self.end_told = False

    @property
    def request_id(self) -> str:
        """The call's id, or the one that was made for it."""
        return self.group.id

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The tokens that the model is given."""
        return self.group.requests[0].prompt_ids

    @property
    def metrics(self) -> RequestMetrics:
        """Its times and counts so far."""
        return self.group.metrics()

    @property
    def ended(self) -> bool:
        """Whether its last update was read."""
        return self._ended

    @property
    def error(self) -> ServiceError | None:
        """What failed it; None if nothing did."""
        return self._error

    def output(self) -> RequestOutput:
        """Everything so far. A copy: costs as much as the output is long."""
        return self.group.output()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestUpdate:
        """The next update, with at least one delta.

        Raises:
            ServiceError: it cannot go on: DEADLINE, UNAVAILABLE, OVERLOADED or INTERNAL.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self._ended or self._closed:
                raise StopAsyncIteration
            if self._news:
                self._news = False
                update = self._reader.read()
                self._ended = update.finished
                if update.deltas:
                    return update
                continue
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def aclose(self) -> None:
        """As `close`."""
        self.close()

    def close(self) -> None:
        """Aborts what is left of the request."""
        if not self._closed:
            self._closed = True
            self._wake()
            self._close(self)

    # For the service.

    def note_news(self, end: bool = False) -> None:
        """There is more to read, and with `end` nothing after that."""
        self._whole |= end
        if end or self._partial:
            self._news = True
            self._wake()

    def fail(self, error: ServiceError) -> None:
        """Ends it with an error unless all of it is there or it has failed before. What was not
        read is lost."""
        if not self._whole and self._error is None:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
