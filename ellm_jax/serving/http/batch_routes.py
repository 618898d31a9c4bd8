"""/v1/batches: files of requests that are run when there is time."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ellm_jax.serving.http import replies
from ellm_jax.serving.http.batches import Batches
from ellm_jax.serving.http.body import read_json
from ellm_jax.serving.http.context import Context, tenant_of
from ellm_jax.serving.http.errors import HttpError
from ellm_jax.serving.http.event_stream import reply
from ellm_jax.serving.http.file_routes import check_open
from ellm_jax.serving.http.files import FileStore
from ellm_jax.serving.http.pages import ends, page
from ellm_jax.serving.http.requests import BatchCreate
from ellm_jax.serving.http.routing import route

_DECODER = msgspec.json.Decoder(BatchCreate)


class BatchRoutes:
    """The routes."""

    def __init__(self, context: Context, store: FileStore, batches: Batches):
        self._context = context
        self._store = store
        self._batches = batches

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            route("/v1/batches", GET=self._list, POST=self._create),
            route("/v1/batches/{id}", GET=self._get),
            route("/v1/batches/{id}/cancel", POST=self._cancel),
        ]

    async def _list(self, request: Request) -> Response:
        found = [stored.batch for stored in self._store.batches(tenant_of(request))]
        data, more = page(found, request)
        return reply(replies.BatchList(data, more, *ends(data)))

    async def _create(self, request: Request) -> Response:
        check_open(self._context.service)
        asked = await read_json(request, _DECODER, self._context.config.max_body_bytes)
        tenant = tenant_of(request)
        file = self._store.get(tenant, asked.input_file_id)
        if file.purpose != "batch":
            raise HttpError(
                400, "the file is no input of a batch; upload one", param="input_file_id"
            )
        return reply(self._batches.create(tenant, asked))

    async def _get(self, request: Request) -> Response:
        return reply(self._store.get_batch(tenant_of(request), request.path_params["id"]).batch)

    async def _cancel(self, request: Request) -> Response:
        stored = self._store.get_batch(tenant_of(request), request.path_params["id"])
        return reply(self._batches.cancel(stored))
