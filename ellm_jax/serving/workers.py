"""Threads for work that would hold up the event loop, with a bound for each tenant."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.tenants import Tenant

_T = TypeVar("_T")
_RETRY_S = 1.0


class Workers:
    """Works for tenants. Belongs to one event loop."""

    def __init__(self, name: str, threads: int, most_of_a_tenant: int):
        """Args:
        name: of the threads.
        threads: how many there are.
        most_of_a_tenant: most pieces of work that a tenant may have there at a time.
        """
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._most = most_of_a_tenant
        self._open: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()

    async def run(self, tenant: Tenant, work: Callable[[], _T]) -> _T:
        """What a piece of work returns.

        Raises:
            ServiceError: OVERLOADED: the tenant has enough there.
        """
        if self._open[tenant.name] >= self._most:
            raise ServiceError(
                ErrorKind.OVERLOADED,
                f"{self._most} texts of {tenant.name!r} wait to be read already, and this server "
                "takes no more; try again later",
                retry_after_s=_RETRY_S,
            )
        self._open[tenant.name] += 1
        future = self._pool.submit(work)
        # It counts until a thread is done with it, not until its client has left.
        future.add_done_callback(lambda done: self._note_done(tenant.name))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Takes no more work, and gives up what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _note_done(self, name: str) -> None:
        try:
            self._loop.call_soon_threadsafe(self._forget, name)
        except RuntimeError:  # the event loop has ended, and with it the count
            return

    def _forget(self, name: str) -> None:
        self._open[name] -= 1
        if not self._open[name]:
            del self._open[name]
