"""When the tokens of a request are due, by its targets and by how fast tokens come."""

from __future__ import annotations

from ellm_jax.request import Request

_GAIN = 0.1
"""How much the latest step, or the latest answer, counts in the running means."""
_MARGIN = 1.5
"""How much slower than now tokens may come before a request is late."""


class Pace:
    """Learns how fast tokens come and how long answers are, and judges who can rest."""

    def __init__(self) -> None:
        """Knows nothing yet: tokens come at once, and answers are as long as they may be."""
        self._token_s = 0.0
        self._used_share = 1.0

    def due_s(self, request: Request) -> float:
        """Until when a request may rest and still keep its TPOT target, a mean over its answer, if
        its tokens then come at the present pace; its rank where it has no target. How long the
        answer will be is judged by how much of `max_tokens` others have lately used."""
        if request.tpot_ms is None or request.first_token_s is None:
            return request.rank[0]
        tokens = max(len(request.output_ids) + 1, round(self._used_share * request.max_tokens))
        left = tokens - len(request.output_ids)
        end_s = request.first_token_s + 1e-3 * request.tpot_ms * (tokens - 1)
        return end_s - _MARGIN * self._token_s * left

    def back_by_s(self, request: Request) -> float:
        """Until when a request may stay in host memory: it may not rest for longer than a prompt
        is promised to wait at most, however long it could."""
        if request.ttft_ms is None:
            return self.due_s(request)
        return min(self.due_s(request), request.left_s + 1e-3 * request.ttft_ms)

    def note_step(self, seconds: float) -> None:
        """A step in which requests decoded took so long."""
        self._token_s += _GAIN * (seconds - self._token_s)

    def note_answer(self, request: Request) -> None:
        """A request came to its end by itself."""
        share = len(request.output_ids) / request.max_tokens
        self._used_share += _GAIN * (share - self._used_share)
