"""Everything that looks at a server: metrics, the log of calls, snapshots and their page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ellm_jax.engine import Engine
from ellm_jax.serving.dashboard import Dashboard
from ellm_jax.serving.logs import RequestLog
from ellm_jax.serving.metrics import CONTENT_TYPE, Metrics
from ellm_jax.serving.observer import Observer
from ellm_jax.serving.observers import Observers
from ellm_jax.serving.snapshots import Sampler

if TYPE_CHECKING:
    from ellm_jax.serving.service import Service


class Watch:
    """Made before the service, which it observes:

        watch = Watch(engine, model_name)
        service = Service(engine, config, watch.observer)
        async with watch.looking_at(service) as routes:
            ...  # serve them beside the others

    Attributes:
        metrics: of calls and of the engine.
        observer: what the service has to tell.
    """

    def __init__(self, engine: Engine, model_name: str = "", *observers: Observer):
        """`observers` are told of calls as well."""
        config = engine.config
        self.metrics = Metrics(
            engine, model_name=model_name, ttft_ms=config.ttft_ms, tpot_ms=config.tpot_ms
        )
        self.observer: Observer = Observers(self.metrics, RequestLog(), *observers)
        self._engine = engine
        self._model_name = model_name

    @contextlib.asynccontextmanager
    async def looking_at(self, service: Service) -> AsyncIterator[list[Route]]:
        """Takes snapshots as long as the with-block lasts. Gives the routes of /metrics and of the
        dashboard; who comes to them has been authenticated."""
        sampler = Sampler(
            self._engine, self.metrics.latencies, queued=lambda: service.stats().queued
        )
        dashboard = Dashboard(service, sampler, self._model_name)
        task = asyncio.create_task(sampler.run())
        try:
            yield [Route("/metrics", self._render, methods=["GET"]), *dashboard.routes()]
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _render(self, request: Request) -> Response:
        body = self.metrics.render(admin=request.state.tenant.admin)
        return Response(body, headers={"content-type": CONTENT_TYPE, "cache-control": "no-store"})
