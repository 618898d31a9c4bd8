"""How the next token of a request is chosen: parameters, checked when they are made.

Names and defaults are those of vLLM, so that a request written for one is understood by the
other. This module knows nothing of JAX: the scheduler, the server and a simulator import it.
"""

import dataclasses
import difflib
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from ellm_jax.structured.output import StructuredOutput

MAX_LOGPROBS = 20
"""Most alternatives per token that may be asked for: the width of the compiled top-n."""

MIN_TEMPERATURE = 1e-3
"""Smallest temperature above 0. Below it the outcome is that of 0, only less clearly said."""

MAX_COMPLETIONS = 128
"""Most completions of one prompt."""

_STOP_STRINGS_MAX = 64
_SEED_MIN, _SEED_MAX = -(2**63), 2**64 - 1


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt.

    Filters apply in this order: logit bias, ``min_tokens``, penalties, the form of structured
    output, temperature, min-p, top-k, top-p.

    Attributes:
        n: Completions per prompt, each with its own noise; at most 128.
        temperature: 0 takes the likeliest token; else from ``MIN_TEMPERATURE`` to 100.
        top_p: Keep the smallest set of tokens whose probability is at least this; 1 is off.
        top_k: Keep the k likeliest tokens, ties with the k-th included; 0 or -1 is off.
        min_p: Keep tokens at least this likely relative to the likeliest one; 0 is off.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that
            occur in the prompt or the output; from 0.01 to 100, 1 is off.
        presence_penalty: Subtracted from the logit of each token in the output; 0 is off.
        frequency_penalty: As above, times the number of occurrences in the output.
        logit_bias: Added to the logit, by token id; from -100 to 100.
        seed: Makes sampling repeatable. None takes a fresh one per request.
        max_tokens: Most tokens to generate. None means up to the context limit.
        min_tokens: End-of-text and stop tokens are impossible before this many tokens, and
            stop strings are not looked for.
        stop: Strings that end the text. A single string is allowed; kept as a tuple.
        stop_token_ids: Tokens that end the text. Kept as a tuple.
        ignore_eos: Go on after the model's end-of-text token.
        logprobs: Report the log probability of each token and of this many likeliest ones.
        prompt_logprobs: The same for the tokens of the prompt.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the stop string at the end of the text.
        structured: What the text has to be: a JSON schema, a regular expression, a grammar, or one
            of several texts. It ends when nothing more may follow; a stop string, a stop token or
            ``max_tokens`` may end it sooner.

    Raises:
        ValueError: a value outside its range; says which, the range, and what to do.
        TypeError: a value of the wrong kind.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_COMPLETIONS, "submit the prompt again for more")
        # Bounds within what float32 holds: outside, steps would compute with 0 or infinity.
        _check_float("temperature", self.temperature, 0.0, 100.0, "use 0 for greedy decoding")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature!r}: must be 0 or at least {MIN_TEMPERATURE}; "
                "use 0 for greedy decoding"
            )
        _check_float("top_p", self.top_p, 1e-9, 1.0, "use 1 to turn it off")
        _check_int("top_k", self.top_k, -1, 2**31 - 1, "use 0 or -1 to turn it off")
        _check_float("min_p", self.min_p, 0.0, 1.0, "use 0 to turn it off")
        _check_float(
            "repetition_penalty",
            self.repetition_penalty,
            0.01,
            100.0,
            "use 1 to turn it off, more to discourage repetition",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _check_float(name, getattr(self, name), -2.0, 2.0, "use 0 to turn it off")
        if self.seed is not None:
            _check_int("seed", self.seed, _SEED_MIN, _SEED_MAX, "leave it out for a fresh seed")
        if self.max_tokens is not None:
            _check_int(
                "max_tokens", self.max_tokens, 1, None, "use None for up to the context limit"
            )
        _check_int("min_tokens", self.min_tokens, 0, None, "use 0 to turn it off")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens}: must be at most max_tokens={self.max_tokens}; "
                "lower min_tokens or raise max_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(
                    name, getattr(self, name), 0, MAX_LOGPROBS, "use None for no log probabilities"
                )
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be True or False")
        if not isinstance(self.structured, StructuredOutput | None):
            raise TypeError(
                f"structured is a {type(self.structured).__name__}: must be a StructuredOutput, as "
                "in StructuredOutput(regex='[0-9]+')"
            )
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_ids(self.stop_token_ids))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Makes parameters from a mapping such as a parsed JSON object.

        Bias keys may be decimal strings, since JSON has no other kind of key; ``structured`` may be
        a mapping, such as {"regex": "[0-9]+"}.

        Raises:
            ValueError: a name that does not exist, with the nearest one that does; or as the
                constructor.
            TypeError: as the constructor.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
                raise ValueError(f"unknown sampling parameter {name!r}; {remedy}")
        structured = values.get("structured")
        if isinstance(structured, Mapping):
            values = {**values, "structured": StructuredOutput.from_dict(structured)}
        return cls(**values)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without noise."""
        return self.temperature == 0

    @property
    def needs_state(self) -> bool:
        """Whether a row of per-token state is needed: penalties, bias or ``min_tokens``."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or bool(self.logit_bias)
            or self.min_tokens > 0
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, empty when there are none."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def noise_seed(self, index: int) -> int:
        """The 32-bit seed of completion ``index``; needs ``seed``.

        Completions of one request differ, and completion 1 of seed 7 is not completion 0 of
        seed 8, as it would be if the index were simply added.
        """
        if self.seed is None:
            raise ValueError("noise_seed needs a seed; draw one first with dataclasses.replace")
        seed = self.seed & (2**64 - 1)
        return ((seed ^ (seed >> 32)) + index * 0x9E3779B9) & 0xFFFFFFFF


def _check_int(name: str, value: object, low: int, high: int | None, remedy: str) -> None:
    # Integral rather than int: token ids often come out of NumPy arrays.
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be a whole number; {remedy}")
    if int(value) < low or (high is not None and int(value) > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={_shown(int(value))}: must be {wanted}; {remedy}")


def _check_float(name: str, value: object, low: float, high: float, remedy: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be a number; {remedy}")
    # So written, NaN is outside too; and a huge int is compared, never converted.
    if not low <= value <= high:
        raise ValueError(
            f"{name}={_shown(value)}: must be a number from {low:g} to {high:g}; {remedy}"
        )


def _shown(value: float) -> str:
    """A number for a message; Python refuses to write the digits of huge ones."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"(a number of {value.bit_length()} bits)"
    return repr(value)


def _checked_bias(bias: object) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias={bias!r}: must map token ids to numbers")
    checked: dict[int, float] = {}
    for key, value in bias.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        _check_int("logit_bias token id", token, 0, 2**31 - 1, "use ids of the model's vocabulary")
        _check_float(
            f"logit_bias[{token}]", value, -100.0, 100.0, "use -100 to rule a token out in practice"
        )
        checked[int(token)] = float(value)
    return checked


def _checked_stop(stop: object) -> tuple[str, ...] | None:
    if stop is None:
        return None
    if not isinstance(stop, str | Sequence) or isinstance(stop, bytes):
        raise TypeError(f"stop={stop!r}: must be a string or a list of strings")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > _STOP_STRINGS_MAX:
        raise ValueError(
            f"stop has {len(strings)} strings: at most {_STOP_STRINGS_MAX} are allowed; leave "
            "out those that contain another one"
        )
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop has {string!r}: must be a string")
        if not string:
            raise ValueError("stop has an empty string, which would end every text; leave it out")
    return strings


def _checked_ids(ids: object) -> tuple[int, ...] | None:
    if ids is None:
        return None
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        raise TypeError(f"stop_token_ids={ids!r}: must be a list of token ids")
    for token in ids:
        _check_int("stop_token_ids entry", token, 0, 2**31 - 1, "use ids of the model's vocabulary")
    return tuple(int(token) for token in ids)
