"""What the kinds of `ellm bench` share: their options, and how they read and write files."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ellm_jax.bench.traces import (
    FORMATS,
    TraceRequest,
    WorkloadError,
    clamped,
    estimated_tokens,
    read_trace,
)
from ellm_jax.cli import options
from ellm_jax.cli.console import Failure, note, plain_errors, reading, write_json
from ellm_jax.config import parse_bytes
from ellm_jax.scheduler.policy import POLICIES

if TYPE_CHECKING:
    from ellm_jax.engine import Engine

MAX_LENGTH = 2**31 - 1
_MIN_RATE = 1e-6
_ALL = "all"


def add_engine(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """--model, --policy and the engine's options."""
    options.add_model_option(parser)
    parser.add_argument(
        "--policy",
        action="append",
        choices=[*POLICIES, _ALL],
        metavar="P",
        help=f"how memory is divided: {', '.join(POLICIES)}, or {_ALL}; may be repeated, to have "
        "several side by side (default: elastic)",
    )
    options.add_engine_options(parser, leave_out=("policy",), **defaults)


def add_trace(parser: argparse.ArgumentParser, name: str = "--workload", **more: Any) -> None:
    """The option for a file of requests, which `more` is the rest of, and how it is made to fit."""
    parser.add_argument(name, metavar="FILE", **more)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="of the file (default: found out from its content)",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="read so many requests from its start"
    )
    parser.add_argument(
        "--max-prompt-len", type=positive, metavar="N", help="cut longer prompts at their end"
    )
    parser.add_argument(
        "--max-output-len", type=positive, metavar="N", help="shorten longer answers"
    )


def add_lengths(
    parser: argparse.ArgumentParser,
    *,
    prompt: tuple[int, int],
    output: tuple[int, int],
    tokens_of: str,
) -> None:
    """--prompt-len and --output-len of random requests, with their defaults."""
    for name, bound, what in (("prompt", prompt, "prompt"), ("output", output, "answer")):
        parser.add_argument(
            f"--{name}-len",
            type=bounds,
            default=bound,
            metavar="LOW:HIGH",
            help=f"{tokens_of} {what} (default: {bound[0]}:{bound[1]})",
        )


def add_run(parser: argparse.ArgumentParser, *, repeats: bool = True) -> None:
    """--seed, --repeats, --json, --save and --label."""
    parser.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="of everything random (default: 0)"
    )
    if repeats:
        parser.add_argument(
            "--repeats",
            type=positive,
            default=1,
            metavar="N",
            help="rounds through all policies; medians are shown (default: 1)",
        )
    parser.add_argument("--json", action="store_true", help="write the result as JSON")
    parser.add_argument(
        "--save", metavar="FILE", help="also write everything to a file, for `ellm bench picture`"
    )
    parser.add_argument("--label", metavar="TEXT", help="what the workload is called in pictures")


def chosen_policies(args: argparse.Namespace) -> list[str]:
    """The policies asked for, each once, in order."""
    given = args.policy or ["elastic"]
    return list(POLICIES) if _ALL in given else list(dict.fromkeys(given))


def engine_maker(args: argparse.Namespace) -> Callable[[str], Engine]:
    """Opens engines as the options say, by policy."""
    from ellm_jax.engine import Engine

    with plain_errors():
        config = options.engine_config(args)

    def make(policy: str) -> Engine:
        return Engine.from_pretrained(args.model, dataclasses.replace(config, policy=policy))

    return make


def shows_progress(args: argparse.Namespace) -> bool:
    """Whether bars are wanted."""
    return options.engine_config(args).progress


def read_requests(args: argparse.Namespace) -> list[TraceRequest]:
    """The workload that --workload names, made to fit; texts are counted as the model does.

    Raises:
        Failure: it cannot be read, or makes no sense.
    """
    return read_fitting(args.workload, args, _token_counter(args.model))


def read_fitting(
    name: str, args: argparse.Namespace, count_tokens: Callable[[str], int] = estimated_tokens
) -> list[TraceRequest]:
    """A file of requests, made to fit as the options of `add_trace` say. Raises as
    `read_requests`."""
    with reading(name) as file:
        try:
            requests = read_trace(file, args.format, limit=args.limit, count_tokens=count_tokens)
        except WorkloadError as error:
            raise Failure(f"{name}: {error}") from error
    return clamped(requests, args.max_prompt_len, args.max_output_len)


def _token_counter(model: str | None) -> Callable[[str], int]:
    """Counts tokens of texts as the model does; loads its tokenizer at the first text."""

    @functools.cache
    def encode() -> Callable[[str], Sequence[int]] | None:
        from ellm_jax.assembly import TINY_MODEL
        from ellm_jax.tokenizer import Tokenizer, TokenizerMissing

        with plain_errors():
            try:
                return Tokenizer.from_dir(TINY_MODEL if model is None else model).encode
            except TokenizerMissing:
                note("ellm: the model has no tokenizer; four bytes of text count as a token")
                return None

    def count(text: str) -> int:
        tokenizer = encode()
        return estimated_tokens(text) if tokenizer is None else len(tokenizer(text))

    return count


def label(args: argparse.Namespace, requests: Sequence[TraceRequest]) -> str:
    """What the workload is called: as asked, or by its median lengths."""
    prompts = sorted(request.prompt_tokens for request in requests)
    outputs = sorted(request.output_tokens for request in requests)
    return args.label or f"{prompts[len(prompts) // 2]}/{outputs[len(outputs) // 2]}"


def publish(args: argparse.Namespace, report: Mapping[str, Any], table: str) -> None:
    """Saves a result where --save says, and writes it out: as JSON, or as a table for people."""
    save(args.save, report)
    if args.json:
        write_json(report)
    else:
        print(table)


def save(path: str | None, result: Mapping[str, Any]) -> None:
    """Writes a result to a file, where one is given.

    Raises:
        Failure: it cannot be written.
    """
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(result) + "\n", encoding="utf-8")
    except OSError as error:
        raise Failure(
            f"{path} cannot be written: {error.strerror}; give another file", exit_code=1
        ) from error


def whole(text: str) -> int:
    """Reads a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def size(text: str) -> int:
    """Reads a number of bytes, as in 64MiB."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_LENGTH:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def bounds(text: str) -> tuple[int, int]:
    """Reads "LOW:HIGH", or one number for both."""
    low, _, high = text.partition(":")
    try:
        pair = int(low), int(high or low)
    except ValueError:
        pair = 0, 0
    if not 1 <= pair[0] <= pair[1] <= MAX_LENGTH:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no range of lengths; write for example 32:512, or 100"
        )
    return pair


def rate(text: str) -> float:
    """Reads requests per second."""
    value = _number(text)
    if not _MIN_RATE <= value < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no rate; write requests per second, at least {_MIN_RATE:g}"
        )
    return value


def seconds(text: str) -> float:
    """Reads a time above 0."""
    value = _number(text)
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write seconds, for example 30")
    return value


def factor(text: str) -> float:
    """Reads a number above 0."""
    value = _number(text)
    if not 0 < value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def share(text: str) -> float:
    """Reads a share: above 0, at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write for example 0.9")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0
