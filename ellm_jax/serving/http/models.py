"""What there is to say about the server and its model, and the tokenizer as a service."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http import replies
from ellm_jax.serving.http.body import read_json
from ellm_jax.serving.http.context import Context, tenant_of
from ellm_jax.serving.http.errors import HttpError
from ellm_jax.serving.http.event_stream import reply
from ellm_jax.serving.http.requests import DetokenizeRequest, TokenizeRequest

_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


class Models:
    """The routes."""

    def __init__(self, context: Context):
        self._context = context
        self._model = replies.Model(
            context.model, context.started, context.service.engine.max_model_len
        )

    async def models(self, request: Request) -> Response:
        """The models that are served."""
        return reply(replies.ModelList([self._model]))

    async def model(self, request: Request) -> Response:
        """One model by its name."""
        self._context.check_model(request.path_params["model"])
        return reply(self._model)

    async def embeddings(self, request: Request) -> Response:
        """No embeddings: the hidden states of a model that was trained to write are none."""
        raise HttpError(
            404,
            f"{self._context.model!r} writes text and gives no embeddings; ask a server with an "
            "embedding model",
            code="not_supported",
        )

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text."""
        asked = await read_json(request, _TOKENIZE, self._context.config.max_body_bytes)
        self._context.check_model(asked.model)
        ids = await self._context.service.texts.tokenize(
            asked.prompt, tenant_of(request), add_special_tokens=asked.add_special_tokens
        )
        return reply(replies.Tokens(list(ids), len(ids), self._model.max_model_len))

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        asked = await read_json(request, _DETOKENIZE, self._context.config.max_body_bytes)
        self._context.check_model(asked.model)
        text = await self._context.service.texts.detokenize(
            asked.tokens, tenant_of(request), skip_special_tokens=asked.skip_special_tokens
        )
        return reply(replies.Text(text))

    async def health(self, request: Request) -> Response:
        """Whether the process should live on."""
        if not self._context.service.live:
            raise ServiceError(
                ErrorKind.UNAVAILABLE, "the engine has failed; start the server again"
            )
        return reply(replies.State("ok"))

    async def ready(self, request: Request) -> Response:
        """Whether new work is taken."""
        if not self._context.service.ready:
            raise ServiceError(ErrorKind.UNAVAILABLE, "no new work is taken; ask another server")
        return reply(replies.State("ready"))
