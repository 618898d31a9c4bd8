"""What every engine is asked, and the figures that its answers make."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ellm_jax.bench.peers.session import PeerError
from ellm_jax.config import format_bytes

_FIRST_TOKEN_ID = 3
"""Lower ids are special in most vocabularies."""
_CLOCK_S = 0.25
"""How far an engine's clock may be from ours before its times are not believed."""
_WARM_PROMPT_TOKENS = 1024
_WARM_OUTPUT_TOKENS = 8

Lengths = tuple[tuple[int, int], ...]
"""Of each request, the tokens of its prompt and of its answer."""


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        tokens: that were generated.
        first_s, last_s: when the first and the last came, from when the requests were given.
    """

    tokens: tuple[int, ...]
    first_s: float
    last_s: float


@dataclass(frozen=True)
class Scenario:
    """Requests that are given at once, and the figures they make.

    Attributes:
        name: for messages.
        lengths: of the requests.
        samples: how often they are asked, with other tokens each time; medians count.
        figures: from the answers to the figures, by key.
    """

    name: str
    lengths: Lengths
    samples: int
    figures: Callable[[Sequence[Answer]], dict[str, float]]

    def requests(self, vocab_size: int, seed: Sequence[int]) -> dict[str, Any]:
        """The requests with random tokens, as the protocol has them."""
        return _requests(self.lengths, vocab_size, seed)

    def warm_up(self, vocab_size: int, seed: Sequence[int]) -> dict[str, Any]:
        """Shorter requests of the kind, which let an engine touch what it will need."""
        lengths = [
            (min(prompt, _WARM_PROMPT_TOKENS), min(output, _WARM_OUTPUT_TOKENS))
            for prompt, output in self.lengths
        ]
        return _requests(lengths, vocab_size, seed)


@dataclass(frozen=True)
class PeerWorkload:
    """The sizes of the scenarios.

    Attributes:
        prompt_tokens, output_tokens: of the request that is alone.
        long_prompt_tokens, long_output_tokens: of the long one; 0 prompt tokens leave it out.
        batch: lengths of the requests that come at once; none leave them out.
        kv_memory_bytes: what engines may have for K and V; None: as much as the requests need.
    """

    prompt_tokens: int = 128
    output_tokens: int = 128
    long_prompt_tokens: int = 8192
    long_output_tokens: int = 64
    batch: Lengths = ()
    kv_memory_bytes: int | None = None

    def scenarios(self) -> list[Scenario]:
        """What is asked, in order."""
        found = [
            Scenario("one request", ((self.prompt_tokens, self.output_tokens),), 3, _alone(""))
        ]
        if self.long_prompt_tokens:
            lengths = ((self.long_prompt_tokens, self.long_output_tokens),)
            found.append(Scenario("a long prompt", lengths, 1, _alone("long_")))
        if self.batch:
            found.append(Scenario(f"{len(self.batch)} requests", self.batch, 1, _together))
        return found

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        return max(prompt + output for s in self.scenarios() for prompt, output in s.lengths)

    @property
    def kv_tokens(self) -> int:
        """Most tokens that are in the KV cache at once."""
        return max(sum(map(sum, scenario.lengths)) for scenario in self.scenarios())

    def titles(self) -> dict[str, str]:
        """Names of the figures, with units, in the order of tables."""
        titles = {
            "decode_tokens_per_s": "decode, 1 request (tokens/s)",
            "ttft_ms": f"first token, {self.prompt_tokens:,} prompt tokens (ms)",
        }
        if self.long_prompt_tokens:
            titles["long_ttft_s"] = f"first token, {self.long_prompt_tokens:,} prompt tokens (s)"
            titles["long_decode_tokens_per_s"] = (
                f"decode behind {self.long_prompt_tokens:,} (tokens/s)"
            )
        if self.batch:
            kv = (
                "" if self.kv_memory_bytes is None else f", KV {format_bytes(self.kv_memory_bytes)}"
            )
            titles["batch_tokens_per_s"] = f"{len(self.batch)} requests{kv} (output tokens/s)"
        return titles | {
            "peak_memory_gib": "peak memory (GiB)",
            "start_s": "start to first token (s)",
            "first_peak_memory_gib": "peak memory, its caches empty (GiB)",
            "first_start_s": "start, its caches empty (s)",
        }


HIGHER_IS_BETTER = ("decode_tokens_per_s", "long_decode_tokens_per_s", "batch_tokens_per_s")
"""Of all other figures, less is better."""


def read_answers(answer: Mapping[str, Any], lengths: Lengths, taken_s: float) -> list[Answer]:
    """The answers to requests of these lengths, which took so long by our clock.

    Raises:
        PeerError: they are not what was asked for, or their times cannot be.
    """
    found = answer.get("answers")
    if not isinstance(found, list) or len(found) != len(lengths):
        raise PeerError(f"it gave no list of {len(lengths)} answers")
    return [
        _read_answer(one, f"request {index}", output, taken_s)
        for index, (one, (_, output)) in enumerate(zip(found, lengths, strict=True))
    ]


def _read_answer(found: Any, who: str, output_tokens: int, taken_s: float) -> Answer:
    if not isinstance(found, dict):
        raise PeerError(f"{who}: {found!r} is no answer")
    tokens, first_s, last_s = (found.get(key) for key in ("tokens", "first_s", "last_s"))
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise PeerError(f"{who}: it gave no tokens")
    if len(tokens) != output_tokens:
        raise PeerError(f"{who}: it gave {len(tokens)} tokens of {output_tokens}")
    if not isinstance(first_s, int | float) or not isinstance(last_s, int | float):
        raise PeerError(f"{who}: it gave no times")
    if not 0 < first_s <= last_s <= taken_s + _CLOCK_S or (output_tokens > 1 and last_s == first_s):
        raise PeerError(
            f"{who}: tokens from {first_s:.3f} s to {last_s:.3f} s, of {taken_s:.3f} s, cannot be"
        )
    return Answer(tuple(tokens), float(first_s), float(last_s))


def median_figures(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each figure's median."""
    return {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}


def random_lengths(
    requests: int, prompt: tuple[int, int], output: tuple[int, int], seed: int
) -> Lengths:
    """Lengths between bounds, both included."""
    rng = np.random.default_rng(seed)
    return tuple(
        (int(rng.integers(prompt[0], prompt[1] + 1)), int(rng.integers(output[0], output[1] + 1)))
        for _ in range(requests)
    )


def _requests(
    lengths: Sequence[tuple[int, int]], vocab_size: int, seed: Sequence[int]
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "do": "run",
        "prompts": [rng.integers(_FIRST_TOKEN_ID, vocab_size, n).tolist() for n, _ in lengths],
        "output_tokens": [output for _, output in lengths],
    }


def _alone(prefix: str) -> Callable[[Sequence[Answer]], dict[str, float]]:
    """Time to the first token, and the speed after it, of one request."""

    def figures(answers: Sequence[Answer]) -> dict[str, float]:
        answer = answers[0]
        first = {"long_ttft_s": answer.first_s} if prefix else {"ttft_ms": 1000 * answer.first_s}
        later = len(answer.tokens) - 1
        return first | {f"{prefix}decode_tokens_per_s": later / (answer.last_s - answer.first_s)}

    return figures


def _together(answers: Sequence[Answer]) -> dict[str, float]:
    """All tokens by the time until the last one."""
    tokens = sum(len(answer.tokens) for answer in answers)
    return {"batch_tokens_per_s": tokens / max(answer.last_s for answer in answers)}
