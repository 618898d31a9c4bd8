"""Reads what a request gives as it grows, each part once: the cost of a stream is its length."""

from __future__ import annotations

from ellm_jax.intake import Group
from ellm_jax.outputs import CompletionDelta, RequestUpdate
from ellm_jax.request import Request, Status
from ellm_jax.text import CompletionText


class ProgressReader:
    """Reads one group's output while the engine's thread writes it. Used by one thread."""

    def __init__(self, group: Group):
        """Starts at the beginning."""
        self._completions = [
            _CompletionReader(index, request, group.texts[request])
            for index, request in enumerate(group.requests)
        ]

    def read(self) -> RequestUpdate:
        """What came since the last call; without deltas if nothing did."""
        deltas = []
        finished = True
        for completion in self._completions:
            delta = completion.read()
            if delta is not None:
                deltas.append(delta)
            finished = finished and completion.ended
        return RequestUpdate(tuple(deltas), finished)


class _CompletionReader:
    """Where one completion has been read up to.

    Attributes:
        ended: whether its end has been read.
    """

    def __init__(self, index: int, request: Request, text: CompletionText | None):
        self._index = index
        self._request = request
        self._text = text
        self._wants_logprobs = request.params.logprobs is not None
        self._tokens = 0
        self._pieces = 0
        self.ended = False

    def read(self) -> CompletionDelta | None:
        """What came since the last call; None if nothing did."""
        if self.ended:
            return None
        request = self._request
        # First: the engine's thread may end it meanwhile, and with its end must come everything.
        ended = request.status is Status.FINISHED
        wants = self._wants_logprobs
        count = len(request.logprobs if wants and not ended else request.output_ids)
        tokens = tuple(request.output_ids[self._tokens : count])
        logprobs = tuple(request.logprobs[self._tokens : count]) if wants else None
        self._tokens = count
        text = self._read_text()
        if not ended:
            if not tokens and not text:
                return None
            return CompletionDelta(self._index, text, tokens, logprobs=logprobs)
        self.ended = True
        return CompletionDelta(
            self._index,
            text,
            tokens,
            request.finish_reason,
            request.stop_reason,
            request.error,
            logprobs,
        )

    def _read_text(self) -> str:
        if self._text is None:
            return ""
        pieces = self._text.pieces[self._pieces :]
        self._pieces += len(pieces)
        return pieces[0] if len(pieces) == 1 else "".join(pieces)
