"""Puts the routes together."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from ellm_jax.serving.http.batch_routes import BatchRoutes
from ellm_jax.serving.http.batches import Batches
from ellm_jax.serving.http.body import Bodies
from ellm_jax.serving.http.chat import Chat
from ellm_jax.serving.http.completions import Completions
from ellm_jax.serving.http.context import Context
from ellm_jax.serving.http.errors import HttpError
from ellm_jax.serving.http.file_routes import FileRoutes
from ellm_jax.serving.http.files import FileStore
from ellm_jax.serving.http.guard import LIVENESS_PATH, Guard
from ellm_jax.serving.http.models import Models
from ellm_jax.serving.http.openapi import document
from ellm_jax.serving.http.origins import Origins
from ellm_jax.serving.http.routing import route
from ellm_jax.serving.service import Service
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.tenants import Keys


def make_app(
    service: Service,
    keys: Keys,
    config: ServeConfig,
    extra_routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """The HTTP API.

    Every route but `LIVENESS_PATH` needs a key where there are keys; routes find who asks in
    `request.state.tenant` and the request's id in `request.state.request_id`. They may raise
    `ServiceError`, which is answered in OpenAI's shape.

    Args:
        service: what answers; started before the first request.
        keys: who may ask.
        config: the server's bounds.
        extra_routes: more of the same, such as metrics.
    """
    context = Context(service, config)
    completions, chat, models = Completions(context), Chat(context), Models(context)
    store = FileStore(config)
    batches = Batches(context, store, completions, chat)
    files, batch = FileRoutes(context, store), BatchRoutes(context, store, batches)
    described = document()

    async def openapi(request: Request) -> Response:
        return Response(described, media_type="application/json")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await batches.start()
        try:
            yield
        finally:
            await batches.stop()
            store.close()

    routes = [
        route(LIVENESS_PATH, GET=models.health),
        route("/ready", GET=models.ready),
        route("/openapi.json", GET=openapi),
        route("/v1/models", GET=models.models),
        route("/v1/models/{model:path}", GET=models.model),
        route("/v1/completions", POST=completions.post),
        route("/v1/chat/completions", POST=chat.post),
        route("/v1/embeddings", POST=models.embeddings),
        route("/tokenize", POST=models.tokenize),
        route("/detokenize", POST=models.detokenize),
        *files.routes(),
        *batch.routes(),
        *extra_routes,
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Guard, keys=keys, origins=Origins(config), observer=service.observer)
        ],
        exception_handlers={HTTPException: _shape},
        lifespan=lifespan,
    )
    app.state.files = store
    app.state.bodies = Bodies(config.max_body_bytes)
    # A redirect would send clients to another address without saying what is wrong.
    app.router.redirect_slashes = False
    return app


def _shape(request: Request, error: Exception) -> Response:
    """Lets what Starlette itself refuses take the same way as all other errors."""
    assert isinstance(error, HTTPException)
    said = {
        404: f"there is no {request.url.path[:200]!r}; see /openapi.json",
        405: f"{request.method} is not for {request.url.path[:200]!r}; see /openapi.json",
    }
    message = said.get(error.status_code, error.detail)
    raise HttpError(error.status_code, message, headers=dict(error.headers or {})) from error
