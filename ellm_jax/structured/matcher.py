"""How far a request is in its grammar, and which tokens may come next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher

MaskWords: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int32]]
"""i32[ceil(V / 32)]: bit t % 32 of word t // 32 says whether token t may come next."""

_WORD_BITS = 32
_REASONS = {"NoExtensionBias": "nothing can satisfy it"}


class GrammarError(ValueError):
    """A grammar that cannot be compiled, or that no token can go on from; says why."""


class GrammarsBusy(GrammarError):
    """A grammar that was not compiled because there was too much to do; another time it may be."""


def mask_words(vocab_size: int) -> int:
    """Words of a mask of so many tokens."""
    return -(-vocab_size // _WORD_BITS)


def words_of(tokens: Iterable[int], vocab_size: int) -> MaskWords:
    """The mask of these tokens alone; those outside the vocabulary are passed over."""
    bits = np.zeros(mask_words(vocab_size) * _WORD_BITS, np.uint8)
    bits[[token for token in tokens if 0 <= token < vocab_size]] = 1
    words: MaskWords = np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
    return words


class Vocabulary:
    """The tokens of a model, as masks.

    Attributes:
        size: how many there are.
        ends: those that end a text.
        texts: all others.
    """

    def __init__(self, size: int, end_ids: Iterable[int]):
        """Takes the size, and the tokens that end a text."""
        self.size = size
        self.ends = words_of(end_ids, size)
        self.texts: MaskWords = words_of(range(size), size) & ~self.ends


class Matcher:
    """The state of one request's grammar after the tokens of its output.

    It lives on the host, and only settled tokens reach it: neither losing its memory nor a step
    that failed takes a request back in it. Used by one thread.

    Attributes:
        allowed: which tokens may come next. Never written in place.
        complete: nothing but the end of the text may come.
        num_tokens: how many tokens it has taken.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        allowed: MaskWords,
        vocabulary: Vocabulary,
        *,
        ends: bool = True,
    ):
        """Takes over a matcher of the library in its first state.

        Args:
            matcher: of the library; nobody else uses it.
            allowed: what it allows first, as the library says.
            vocabulary: of the model.
            ends: whether the text may end where more may follow too. Otherwise it goes on as long
                as the grammar has anything to go on with.
        """
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._may_end = ends
        self.num_tokens = 0
        self.complete = False
        self.allowed = self._checked(allowed)

    def take(self, token: int) -> None:
        """Goes on by a token that was allowed.

        Raises:
            GrammarError: it was not allowed, or nothing can follow it, or what may follow takes
                too long to find out.
        """
        self.num_tokens += 1
        if not self._matcher.consume_token(token):
            reason = reason_of(self._matcher.get_error())
            raise GrammarError(f"token {token} does not follow: {reason}")
        if self._matcher.is_stopped():
            self._check()
            self.complete = True
            return
        self.allowed = self._checked(next_words(self._matcher, self._vocabulary.size))

    def leaves_beside(self, tokens: Iterable[int]) -> bool:
        """Whether any other token than these may come next."""
        return bool(np.any(self.allowed & ~words_of(tokens, self._vocabulary.size)))

    def _checked(self, allowed: MaskWords) -> MaskWords:
        """The tokens of the vocabulary that may come next."""
        self._check()
        texts: MaskWords = allowed & self._vocabulary.texts
        self.complete = not texts.any()
        if not self.complete and not self._may_end:
            return texts
        allowed = texts | (allowed & self._vocabulary.ends)
        if not allowed.any():
            raise GrammarError(
                "no token of the vocabulary can go on from here; change what the output has to be"
            )
        return allowed

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(reason_of(self._matcher.get_error()))


def next_words(matcher: LLMatcher, vocab_size: int) -> MaskWords:
    """What a matcher of the library allows next, cut to the model's vocabulary."""
    words: MaskWords = np.frombuffer(matcher.compute_bitmask(), np.int32)
    return words[: mask_words(vocab_size)]


def reason_of(text: str, chars_max: int = 300) -> str:
    """What a message of the library comes to: it may quote what it was given at length."""
    lines = text.strip().splitlines() or ["nothing can satisfy it"]
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    line = _REASONS.get(line, line).removeprefix("error: ")
    return line if len(line) <= chars_max else f"{line[:chars_max]}..."
