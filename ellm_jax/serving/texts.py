"""The model's tokenizer as a service."""

from __future__ import annotations

from collections.abc import Sequence

from ellm_jax.engine import Engine
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.tenants import Tenant
from ellm_jax.serving.workers import Workers
from ellm_jax.tokenizer import Tokenizer

TEXTS_MAX = 32
"""Most texts of a tenant that are tokenized, or read from tokens, at a time."""


class Texts:
    """Turns texts into tokens and back, on threads of its own: whoever only counts tokens is not to
    hold up answers. Belongs to one event loop."""

    def __init__(self, engine: Engine, max_chars: int):
        """Takes the engine with the tokenizer, and the most characters of a text."""
        self._engine = engine
        self._max_chars = max_chars
        self._workers = Workers("ellm-texts", 2, TEXTS_MAX)

    async def tokenize(
        self, text: str, tenant: Tenant, *, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a text.

        Raises:
            ServiceError: INVALID: it is no text, or the model has no tokenizer; TOO_LARGE;
                OVERLOADED: the tenant has many there already.
        """
        tokenizer = self._tokenizer()
        self._check_length("text", len(text), self._max_chars, "characters")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ServiceError(
                ErrorKind.INVALID, "text has half of a surrogate pair; take it out", param="text"
            ) from error
        return await self._workers.run(tenant, lambda: tokenizer.encode(text, add_special_tokens))

    async def detokenize(
        self, ids: Sequence[int], tenant: Tenant, *, skip_special_tokens: bool = True
    ) -> str:
        """The text of token ids.

        Raises:
            ServiceError: INVALID: an id outside the vocabulary, or the model has no tokenizer;
                TOO_LARGE; OVERLOADED: the tenant has many there already.
        """
        tokenizer = self._tokenizer()
        self._check_length("token_ids", len(ids), self._engine.max_model_len, "tokens")
        vocab = self._engine.model_config.vocab_size
        bad = next((token for token in ids if not 0 <= token < vocab), None)
        if bad is not None:
            raise ServiceError(
                ErrorKind.INVALID,
                f"token_ids has {bad}, outside the vocabulary of {vocab} tokens",
                param="token_ids",
            )
        return await self._workers.run(tenant, lambda: tokenizer.decode(ids, skip_special_tokens))

    def _tokenizer(self) -> Tokenizer:
        if self._engine.tokenizer is None:
            raise ServiceError(
                ErrorKind.INVALID, "the model has no tokenizer; give and take token ids"
            )
        return self._engine.tokenizer

    def _check_length(self, param: str, count: int, most: int, what: str) -> None:
        if count > most:
            message = f"{param} has {count} {what}, and this server takes {most}; give fewer"
            raise ServiceError(ErrorKind.TOO_LARGE, message, param=param)

    def close(self) -> None:
        """Takes no more texts."""
        self._workers.close()
