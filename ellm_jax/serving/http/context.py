"""What the routes share: the service, its model, and how both are named."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request

from ellm_jax.outputs import RequestOutput
from ellm_jax.sampling import SamplingParams
from ellm_jax.serving.call import Call
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http import replies
from ellm_jax.serving.http.errors import HttpError
from ellm_jax.serving.http.logprobs import TokenTexts
from ellm_jax.serving.http.tool_calls import format_of
from ellm_jax.serving.service import Service
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.tenants import Tenant


class Context:
    """Made once per server.

    Attributes:
        service: what answers.
        config: the server's bounds.
        tokenizer: the model's; None where it has none.
        model: the name that clients call the model by.
        started: when the server was made, in seconds since 1970.
        texts: the texts of single tokens.
        tool_format: how the model writes calls of tools; None where it does not.
    """

    def __init__(self, service: Service, config: ServeConfig):
        self.service = service
        self.config = config
        self.tokenizer = service.engine.tokenizer
        self.model = service.model_info().name
        self.started = int(time.time())
        self.texts = TokenTexts(self.tokenizer)
        self.tool_format = format_of(self.tokenizer)

    def check_model(self, name: str | None) -> None:
        """Raises HttpError (404) unless this is the model that is served, or none is named."""
        if name is not None and name != self.model:
            raise HttpError(
                404,
                f"the model {name[:200]!r} is not served here; there is {self.model!r}",
                code="model_not_found",
                param="model",
            )


def tenant_of(request: Request) -> Tenant:
    """Who asks."""
    tenant: Tenant = request.state.tenant
    return tenant


@dataclass(frozen=True)
class Caller:
    """Who asks, and how.

    Attributes:
        tenant: who.
        call_id: what logs and traces call it; None: whatever the service does.
        priority: lower is sooner.
    """

    tenant: Tenant
    call_id: str | None = None
    priority: int = 0

    def call(
        self, prompt: str | Sequence[int], params: SamplingParams, number: int | None = None
    ) -> Call:
        """A call of the service; `number` tells those of one request apart."""
        name = self.call_id
        if name is not None and number is not None:
            name = f"{name}-{number}"
        return Call(prompt, params, self.tenant, request_id=name, priority=self.priority)


def caller_of(request: Request) -> Caller:
    """Who asks, by a request."""
    return Caller(tenant_of(request), request.state.call_id)


def new_id(kind: str) -> str:
    """A new id, such as "chatcmpl-1f...": its kind and 128 random bits."""
    return f"{kind}-{uuid.uuid4().hex}"


@dataclass
class Tally:
    """Counts the tokens of a request; of several prompts, all together."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, output: RequestOutput) -> None:
        """Counts all of an output."""
        self.prompt_tokens += len(output.prompt_token_ids)
        self.completion_tokens += sum(len(each.token_ids) for each in output.outputs)
        self.cached_tokens += output.metrics.cached_tokens

    @property
    def usage(self) -> replies.Usage:
        """What was counted, as OpenAI says it."""
        return replies.Usage(
            self.prompt_tokens,
            self.completion_tokens,
            self.prompt_tokens + self.completion_tokens,
            replies.PromptTokensDetails(self.cached_tokens),
        )


def finish_reason(reason: str | None, error: str | None) -> replies.FinishReason | None:
    """Why a completion ended, as OpenAI says it.

    Raises:
        ServiceError: it was ended before it was done.
    """
    if reason is None:
        return None
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    if reason == "abort":
        raise ServiceError(ErrorKind.UNAVAILABLE, "the request was ended; send it again")
    raise ServiceError(ErrorKind.INTERNAL, error or "the request failed; see the server's log")
