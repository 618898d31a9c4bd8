"""The text of one completion as its tokens come, cut where a stop string says."""

from __future__ import annotations

from collections.abc import Sequence

from ellm_jax.sampling import SamplingParams
from ellm_jax.tokenizer import Detokenizer, StopChecker, Tokenizer


class CompletionText:
    """Text so far, and what is held back because it may become a stop string.

    Attributes:
        pieces: the text in the order in which it came. Only appended to, so that readers on other
            threads can take up where they stopped.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams):
        """Starts behind the prompt, with the stop strings of `params`."""
        self._detokenizer = Detokenizer(tokenizer, prompt_ids, params.skip_special_tokens)
        self._checker = StopChecker(params.stop_strings, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._tokens = 0
        self.pieces: list[str] = []

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)

    def push(self, token: int) -> str | None:
        """Takes the next token; the stop string that it completes, if one."""
        self._tokens += 1
        piece = self._detokenizer.feed([token])
        checked = self._checker.feed(piece, armed=self._tokens > self._min_tokens)
        self._add(checked.text)
        return checked.stop

    def finish(self) -> None:
        """Lets go of what was held back; not to be called after a stop string."""
        checked = self._checker.feed(self._detokenizer.finish(), armed=False)
        self._add(checked.text + self._checker.finish())

    def _add(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
