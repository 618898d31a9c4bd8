"""The files that traces come in, one function each: text in, requests in the file's order out."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ellm_jax.bench.trace_request import BLOCK_TOKENS, TraceRequest, WorkloadError

CountTokens = Callable[[str], int]

MAX_ARRIVAL_S = 1e9
_MAX_TOKENS = 2**31 - 1
_USERS = ("human", "user")
_MODELS = ("gpt", "assistant", "chatgpt", "bing", "bard")

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


def read_jsonl(lines: Iterable[str], count_tokens: CountTokens) -> Iterator[TraceRequest]:
    """Our own: a line has `output_len`, one of `prompt_len` and `prompt_token_ids`, and may have
    `arrival_s` (seconds, 0 where it is left out), `prefix` (ids of blocks) and `id`."""
    for number, fields in _json_lines(lines):
        with _at(f"line {number}"):
            unknown = fields.keys() - _OUR_FIELDS
            if unknown:
                raise ValueError(f"unknown field {min(unknown)!r}; leave it out")
            ids, length = fields.get("prompt_token_ids"), fields.get("prompt_len")
            if (ids is None) == (length is None):
                raise ValueError("give one of prompt_len and prompt_token_ids")
            if ids is not None:
                ids = _whole_numbers("prompt_token_ids", ids)
                length = len(ids)
            prefix = fields.get("prefix")
            yield TraceRequest(
                arrival_s=_seconds("arrival_s", fields.get("arrival_s", 0.0)),
                prompt_tokens=_count("prompt_len", length),
                output_tokens=_count("output_len", fields.get("output_len")),
                prefix=None if prefix is None else _whole_numbers("prefix", prefix),
                id=str(fields.get("id", number)),
                token_ids=ids,
            )


_OUR_FIELDS = {"arrival_s", "prompt_len", "prompt_token_ids", "output_len", "prefix", "id"}


def read_mooncake(lines: Iterable[str], count_tokens: CountTokens) -> Iterator[TraceRequest]:
    """Mooncake: `timestamp` in milliseconds, `input_length`, `output_length` and `hash_ids`, one
    per block of 512 prompt tokens, the last block perhaps not full. Requests without a prompt or
    an answer are left out."""
    for number, fields in _json_lines(lines):
        with _at(f"line {number}"):
            missing = {"timestamp", "input_length", "output_length"} - fields.keys()
            if missing:
                raise ValueError(f"no field {min(missing)!r}")
            prompt = _length("input_length", fields["input_length"])
            output = _length("output_length", fields["output_length"])
            arrival_s = _seconds("timestamp", fields["timestamp"], per_second=1000)
            prefix = _whole_numbers("hash_ids", fields.get("hash_ids", []))
            if prompt and output:
                blocks = -(-prompt // BLOCK_TOKENS)
                yield TraceRequest(
                    arrival_s, prompt, output, prefix=prefix[:blocks] or None, id=str(number)
                )


def read_azure(lines: Iterable[str], count_tokens: CountTokens) -> Iterator[TraceRequest]:
    """Azure LLM inference, 2023 and 2024: `TIMESTAMP` (a date, up to 7 digits after the second, in
    2024 with an offset), `ContextTokens`, `GeneratedTokens`. Requests without a prompt or an
    answer are left out."""
    for number, row in _csv_rows(lines, AZURE_COLUMNS):
        with _at(f"line {number}"):
            prompt = _length("ContextTokens", row["ContextTokens"])
            output = _length("GeneratedTokens", row["GeneratedTokens"])
            arrival_s = _date_s(row["TIMESTAMP"])
            if prompt and output:
                yield TraceRequest(arrival_s, prompt, output, id=str(number))


def read_burstgpt(lines: Iterable[str], count_tokens: CountTokens) -> Iterator[TraceRequest]:
    """BurstGPT: `Timestamp` in seconds, `Model`, `Request tokens`, `Response tokens`, `Total
    tokens`, `Log Type`. A response of 0 tokens is a failure of the service then; such requests
    are left out."""
    for number, row in _csv_rows(lines, BURSTGPT_COLUMNS):
        with _at(f"line {number}"):
            prompt = _length("Request tokens", row["Request tokens"])
            output = _length("Response tokens", row["Response tokens"])
            arrival_s = _seconds("Timestamp", _number("Timestamp", row["Timestamp"]))
            if prompt and output:
                yield TraceRequest(arrival_s, prompt, output, id=str(number))


def read_sharegpt(lines: Iterable[str], count_tokens: CountTokens) -> Iterator[TraceRequest]:
    """ShareGPT: a JSON array, or a line per object, with `conversations`: turns of `from` and
    `value`. The first question that is answered is the prompt, the answer gives the length. There
    are no times: all arrive at 0. Conversations without an answered question are left out."""
    for number, fields in _json_array_or_lines(lines):
        with _at(f"conversation {number}"):
            turns = fields.get("conversations")
            if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
                raise ValueError("no list 'conversations' of turns")
            for question, answer in itertools.pairwise(turns):
                if question.get("from") in _USERS and answer.get("from") in _MODELS:
                    prompt = _text(question)
                    lengths = count_tokens(prompt), count_tokens(_text(answer))
                    if all(lengths):
                        name = str(fields.get("id", number))
                        yield TraceRequest(0.0, *lengths, prompt=prompt, id=name)
                    break


def _json_lines(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            with _at(f"line {number}"):
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    raise ValueError("not a JSON object")
            yield number, fields


def _json_array_or_lines(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    text = "".join(lines)
    if not text.lstrip().startswith("["):
        yield from _json_lines(text.splitlines())
        return
    with _at("the array"):
        entries = json.loads(text)
    for number, fields in enumerate(entries, 1):
        if not isinstance(fields, dict):
            raise WorkloadError(f"conversation {number}: not a JSON object")
        yield number, fields


def _csv_rows(
    lines: Iterable[str], columns: Sequence[str]
) -> Iterator[tuple[int, Mapping[str, str]]]:
    reader = csv.DictReader(lines)
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise WorkloadError(f"line 1: no column {missing[0]!r}; the header names the columns")
    try:
        for row in reader:
            if any(row[name] is None for name in columns):
                raise WorkloadError(f"line {reader.line_num}: fewer fields than the header")
            yield reader.line_num, row
    except csv.Error as error:
        raise WorkloadError(f"line {reader.line_num}: {error}") from error


class _at:  # noqa: N801  # reads as a word: with _at("line 3")
    """Says where an error happened."""

    def __init__(self, place: str):
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, ValueError | RecursionError):
            raise WorkloadError(f"{self._place}: {error}") from error


def _date_s(text: str) -> float:
    """Seconds since 1970; Python reads no more than 6 digits after the second."""
    try:
        date = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text.strip()))
    except ValueError:
        raise ValueError(
            f"TIMESTAMP={text!r}: must be a date such as 2023-11-16 18:17:03.9799600"
        ) from None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return date.timestamp()


def _seconds(name: str, value: object, per_second: int = 1) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={value!r}: must be a number")
    # So written, NaN is refused too; and a huge int is compared, never converted.
    if not 0 <= value <= MAX_ARRIVAL_S * per_second:
        raise ValueError(f"{name}={value!r}: must be from 0 to {MAX_ARRIVAL_S * per_second:g}")
    return value / per_second


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: must be a number") from None


def _count(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
    return value


def _length(name: str, value: object) -> int:
    """A number of tokens; 0 is one too."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,12}(\.0*)?\s*", value, re.ASCII):
        value = int(value.partition(".")[0])
    if type(value) is not int or not 0 <= value <= _MAX_TOKENS:
        raise ValueError(f"{name}={value!r}: must be a whole number from 0 to {_MAX_TOKENS}")
    return value


def _whole_numbers(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
        raise ValueError(f"{name} must be a list of whole numbers of at least 0")
    return tuple(value)


def _text(turn: Mapping[str, Any]) -> str:
    value = turn.get("value")
    if not isinstance(value, str):
        raise ValueError("a turn without a text 'value'")
    return value
