"""Compiles what outputs have to be, on threads of its own, and keeps what was compiled.

The work is llguidance's. It is imported with the first request that needs it, and is not part of a
plain installation.
"""

from __future__ import annotations

import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ellm_jax.structured.matcher import (
    GrammarError,
    GrammarsBusy,
    MaskWords,
    Matcher,
    Vocabulary,
    next_words,
    reason_of,
)
from ellm_jax.structured.output import StructuredOutput

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from ellm_jax.tokenizer import Tokenizer

KEPT_MAX = 128
"""Compiled grammars that are kept; of more, those that nobody asked for the longest go."""

COMPILE_S_MAX = 10.0
"""Longest that a request waits for its grammar."""

_WORKERS = 2
_WAITING_MAX = 256
_REGEX_SPECIAL = frozenset(r"\.+*?()|[]{}^$#&-~")

# Of the library's defaults those that let a step with a hostile grammar take long are lowered: with
# 128K tokens a mask then takes tens of milliseconds at worst, and some microseconds as a rule.
_LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
}

# A blank or two, or a new line with its indentation: models that are unsure would else go on with
# blanks for ever.
_JSON_RULES: Any = {"whitespace_pattern": r"[ \t]{1,2}|\r?\n[ \t]{0,40}", "lenient": False}


class Grammar:
    """A compiled grammar in its first state; makes matchers for requests. May be shared."""

    def __init__(self, first: LLMatcher, vocabulary: Vocabulary):
        """Takes over a matcher of the library that has taken no token.

        Raises:
            GrammarError: it is in error, or no output can follow it.
        """
        if first.is_error():
            raise GrammarError(reason_of(first.get_error()))
        self._first = first
        self._vocabulary = vocabulary
        self._allowed: MaskWords = next_words(first, vocabulary.size)
        self.matcher()  # finds out whether anything is allowed at all

    def matcher(self, *, ends: bool = True) -> Matcher:
        """The state of a new request; `ends` as of `Matcher`."""
        return Matcher(self._first.deep_copy(), self._allowed, self._vocabulary, ends=ends)


class _Job:
    """A grammar to compile; ends once, when it is compiled or its time is over."""

    def __init__(self, wanted: StructuredOutput):
        self.wanted = wanted
        self.over = False
        self.future: Future[Grammar] = Future()
        self.future.set_running_or_notify_cancel()  # from here on nobody can cancel it


class Grammars:
    """Compiles grammars for one model, each once. Methods may be called from any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_ids: Sequence[int],
        *,
        compile_s_max: float = COMPILE_S_MAX,
        kept_max: int = KEPT_MAX,
    ):
        """Args:
        tokenizer: of the model.
        vocab_size: of the model; a mask has so many bits.
        end_ids: tokens that end a text; none: the tokenizer's.
        compile_s_max: longest that a request waits for its grammar.
        kept_max: compiled grammars that are kept.
        """
        self._text_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = tuple(end_ids)
        self._compile_s_max = compile_s_max
        self._kept_max = kept_max
        self._lock = threading.Lock()
        self._kept: OrderedDict[StructuredOutput, Future[Grammar]] = OrderedDict()
        self._waiting = 0
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="ellm-grammar")
        self._tokenizer_lock = threading.Lock()
        self._tokens: tuple[LLTokenizer, Vocabulary] | None = None

    def get(self, wanted: StructuredOutput) -> Future[Grammar]:
        """The compiled grammar, now or soon; the future holds `GrammarError` where it cannot be
        compiled, `GrammarsBusy` where it was not in time. Nobody can cancel it: others may wait for
        the same.

        Raises:
            GrammarsBusy: too many grammars wait to be compiled.
            GrammarError: llguidance is not installed.
        """
        if importlib.util.find_spec("llguidance") is None:
            raise GrammarError(
                "structured output needs llguidance, which is not installed; "
                "pip install 'ellm-jax[serve]'"
            )
        with self._lock:
            known = self._kept.get(wanted)
            if known is not None:
                self._kept.move_to_end(wanted)
                return known
            if self._waiting >= _WAITING_MAX:
                raise GrammarsBusy(
                    f"{self._waiting} grammars wait to be compiled; try again in a moment"
                )
            self._waiting += 1
            job = _Job(wanted)
            self._kept[wanted] = job.future
            self._drop_oldest()
        timer = threading.Timer(self._compile_s_max, lambda: self._give_up(job))
        timer.daemon = True
        timer.start()
        try:
            self._pool.submit(self._run, job, timer)
        except RuntimeError as error:
            timer.cancel()
            raise GrammarError("grammars are compiled no more: the engine is closed") from error
        return job.future

    def close(self) -> None:
        """Gives up what waits to be compiled; what is being compiled ends on its own."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _drop_oldest(self) -> None:
        done = [wanted for wanted, future in self._kept.items() if future.done()]
        for wanted in done[: max(0, len(self._kept) - self._kept_max)]:
            del self._kept[wanted]

    def _give_up(self, job: _Job) -> None:
        with self._lock:
            # Another time the machine may be less busy.
            if not job.over:
                self._kept.pop(job.wanted, None)
        self._end(
            job,
            GrammarsBusy(
                f"{job.wanted.kind} was not compiled within {self._compile_s_max:g} s; make it "
                "simpler, or try again when there is less to do"
            ),
        )

    def _run(self, job: _Job, timer: threading.Timer) -> None:
        result: Grammar | GrammarError
        kind = job.wanted.kind
        try:
            result = self._compile(job.wanted)
        except GrammarError as error:
            result = GrammarError(f"{kind} cannot be used: {error}; change it")
        except Exception as error:  # whatever the library may raise: it ends one request
            result = GrammarError(f"{kind} cannot be compiled: {reason_of(str(error))}")
        timer.cancel()
        with self._lock:
            self._waiting -= 1
        self._end(job, result)

    def _end(self, job: _Job, result: Grammar | GrammarError) -> None:
        with self._lock:
            first, job.over = not job.over, True
        if not first:
            return
        if isinstance(result, GrammarError):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)

    def _compile(self, wanted: StructuredOutput) -> Grammar:
        import llguidance

        limits = llguidance.LLParserLimits(verbose_errors=False, **_LIMITS)
        tokenizer, vocabulary = self._vocabulary()
        first = llguidance.LLMatcher(tokenizer, _source(wanted), log_level=0, limits=limits)
        return Grammar(first, vocabulary)

    def _vocabulary(self) -> tuple[LLTokenizer, Vocabulary]:
        """The tokenizer as the library has it, which takes a second to make for a large vocabulary,
        and the model's tokens."""
        import llguidance

        with self._tokenizer_lock:
            if self._tokens is None:
                text = self._text_tokenizer
                try:
                    tokenizer = llguidance.LLTokenizer(
                        text.backend.to_str(),
                        n_vocab=max(self._vocab_size, text.vocab_size),
                        eos_token=list(self._end_ids) or text.token_id("eos_token"),
                    )
                except Exception as error:
                    raise GrammarError(
                        f"llguidance cannot work with this model's tokenizer: {error}"
                    ) from error
                ends = self._end_ids or tokenizer.eos_tokens
                self._tokens = tokenizer, Vocabulary(self._vocab_size, ends)
            return self._tokens


def _source(wanted: StructuredOutput) -> str:
    """What the library compiles."""
    from llguidance import LLMatcher

    source: str
    if wanted.json_schema is not None:
        schema: Any = wanted.json_schema
        source = LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_RULES)
    elif wanted.regex is not None:
        source = LLMatcher.grammar_from_regex(wanted.regex)
    elif wanted.choice is not None:
        # As one expression it is one state machine; a rule per text would be followed side by side.
        source = LLMatcher.grammar_from_regex("|".join(map(_literally, wanted.choice)))
    else:
        assert wanted.grammar is not None
        source = LLMatcher.grammar_from_lark(_as_lark(wanted.grammar))
    return source


def _as_lark(grammar: str) -> str:
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    return str(any_to_lark(grammar))


def _literally(text: str) -> str:
    """A regular expression for this text alone."""
    return "".join(f"\\{char}" if char in _REGEX_SPECIAL else char for char in text)
