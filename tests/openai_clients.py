"""OpenAI's two clients behind one face, so that a test of the one is a test of the other."""

import asyncio
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openai import AsyncOpenAI, OpenAI

KINDS = ("sync", "async")
WAIT_S = 120.0


@contextmanager
def openai_client(kind: str, **options: Any) -> Iterator[Any]:
    """A client of a kind; the asynchronous one is called as the other."""
    if kind == "sync":
        with OpenAI(max_retries=0, **options) as client:
            yield client
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    client = _Waiting(AsyncOpenAI(max_retries=0, **options), loop)
    try:
        yield client
    finally:
        client.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()


class _Waiting:
    """Something of the asynchronous client; what it says is waited for."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop):
        self._target, self._loop = target, loop

    def __getattr__(self, name: str) -> Any:
        return self._wrapped(getattr(self._target, name))

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._wrapped(self._wait(self._target(*args, **options)))

    def __iter__(self) -> Iterator[Any]:
        each = aiter(self._target)
        while (value := self._wait(anext(each, self))) is not self:
            yield value

    def __enter__(self) -> "_Waiting":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, value: Any) -> Any:
        if not inspect.isawaitable(value):
            return value

        async def waited() -> Any:
            return await value

        return asyncio.run_coroutine_threadsafe(waited(), self._loop).result(WAIT_S)

    def _wrapped(self, value: Any) -> Any:
        """Resources, methods and streams need somebody who waits; answers do not."""
        resource = type(value).__module__.startswith("openai.resources")
        if resource or isinstance(value, AsyncOpenAI):
            return _Waiting(value, self._loop)
        if inspect.isroutine(value) or hasattr(value, "__aiter__"):
            return _Waiting(value, self._loop)
        return value
