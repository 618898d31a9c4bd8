"""Log probabilities as the two APIs of OpenAI say them."""

from __future__ import annotations

from collections.abc import Sequence

from ellm_jax.outputs import TokenLogprobs
from ellm_jax.serving.http import replies
from ellm_jax.tokenizer import Tokenizer

_CACHED_TOKENS_MAX = 2**16
_NO_TEXT = "\N{REPLACEMENT CHARACTER}"


class TokenTexts:
    """The texts of single tokens, each found once."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """The text of a token; without a tokenizer, "token_id:" and its number."""
        found = self._texts.get(token)
        if found is None:
            if self._tokenizer is None:
                return f"token_id:{token}"
            found = self._tokenizer.decode([token], skip_special_tokens=False)
            if len(self._texts) >= _CACHED_TOKENS_MAX:
                self._texts.clear()
            self._texts[token] = found
        return found

    def chat(self, entries: Sequence[TokenLogprobs]) -> replies.ChatLogprobs:
        """As chats say it."""
        return replies.ChatLogprobs(
            [
                replies.TokenLogprob(
                    *self._said(entry.token_id, entry.logprob),
                    [replies.TopLogprob(*self._said(*top)) for top in entry.top],
                )
                for entry in entries
            ]
        )

    def completion(self, entries: Sequence[TokenLogprobs], offset: int) -> replies.TextLogprobs:
        """As completions say it; `offset` is the number of characters before the first token."""
        said = replies.TextLogprobs([], [], [], [])
        for entry in entries:
            text = self.text(entry.token_id)
            said.tokens.append(text)
            said.token_logprobs.append(entry.logprob)
            said.top_logprobs.append({self.text(token): value for token, value in entry.top})
            said.text_offset.append(offset)
            offset += len(text)
        return said

    def _said(self, token: int, logprob: float) -> tuple[str, float, list[int] | None]:
        text = self.text(token)
        # A token may be part of a character: its bytes are not those of the text it decodes to.
        return text, logprob, None if _NO_TEXT in text else list(text.encode())
