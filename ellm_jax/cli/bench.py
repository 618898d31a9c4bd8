"""`ellm bench`: measure an engine with a workload, or make one."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ellm_jax.bench.workload import (
    WorkloadError,
    make_workload,
    read_workload,
    workload_lines,
)
from ellm_jax.cli import options
from ellm_jax.cli.console import Failure, note, plain_errors, reading, write_json

_EXAMPLES = """\
examples:
  ellm bench workload --requests 64 --prompt-len 32:512 --output-len 16:256 > w.jsonl
  ellm bench offline --workload w.jsonl --device-memory 64MiB
"""
_OFFLINE_EXAMPLES = """\
examples:
  ellm bench offline --workload w.jsonl --device-memory 64MiB
  ellm bench offline --model ./my-model --workload w.jsonl --device-memory 8GiB --json
  ellm bench workload --requests 8 | ellm bench offline --workload -

A line of the workload: {"arrival_s": 0.5, "prompt_len": 128, "output_len": 64}, or with
"prompt_token_ids" in place of "prompt_len". Arrivals are kept in real time. Compiling is done
before the clock starts.
"""
_WORKLOAD_EXAMPLES = """\
examples:
  ellm bench workload --requests 64 --prompt-len 32:512 --output-len 16:256 --seed 1 > w.jsonl
  ellm bench workload --requests 100 --rate 4 > poisson.jsonl
"""

_MAX_LENGTH = 2**31 - 1
_MIN_RATE = 1e-6


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory",
        description="Measures speed and memory.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    _add_offline(kinds)
    _add_workload(kinds)


def _add_offline(kinds: Any) -> None:
    parser = kinds.add_parser(
        "offline",
        help="run a workload in this process",
        description="Runs a workload in this process and says how it went.",
        epilog=_OFFLINE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_model_option(parser)
    parser.add_argument(
        "--workload", metavar="FILE", required=True, help="the requests; - for standard input"
    )
    parser.add_argument("--seed", type=_whole, default=0, metavar="N", help="of random prompts")
    parser.add_argument("--json", action="store_true", help="write the result as JSON")
    options.add_engine_options(parser)
    parser.set_defaults(run=_run_offline)


def _add_workload(kinds: Any) -> None:
    parser = kinds.add_parser(
        "workload",
        help="make a random workload",
        description="Writes a random workload to standard output.",
        epilog=_WORKLOAD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=_whole, default=64, metavar="N", help="how many")
    parser.add_argument(
        "--prompt-len",
        type=_bounds,
        default=(32, 512),
        metavar="LOW:HIGH",
        help="tokens of a prompt (default: 32:512)",
    )
    parser.add_argument(
        "--output-len",
        type=_bounds,
        default=(16, 256),
        metavar="LOW:HIGH",
        help="tokens of an answer (default: 16:256)",
    )
    parser.add_argument(
        "--rate", type=_rate, metavar="R", help="requests per second (default: all at the start)"
    )
    parser.add_argument("--seed", type=_whole, default=0, metavar="N", help="of the random numbers")
    parser.set_defaults(run=_run_workload)


def _run_offline(args: argparse.Namespace) -> int:
    from ellm_jax.bench.offline import run_offline, table
    from ellm_jax.engine import Engine

    with reading(args.workload) as file:
        try:
            arrivals = read_workload(file)
        except WorkloadError as error:
            raise Failure(f"{args.workload}: {error}") from error
    with plain_errors():
        config = options.engine_config(args)
        engine = Engine.from_pretrained(args.model, config)
    with engine, plain_errors():
        result, remarks = run_offline(engine, arrivals, seed=args.seed, progress=config.progress)
    if args.json:
        write_json(dataclasses.asdict(result))
    else:
        print(table(result))
    if remarks.compile_s >= 0.001:
        note(f"ellm: {remarks.compile_s:.2f} s of this were spent on compiling")
    if remarks.errors:
        raise Failure(f"{len(remarks.errors)} requests failed: {remarks.errors[0]}", exit_code=1)
    return 0


def _run_workload(args: argparse.Namespace) -> int:
    arrivals = make_workload(args.requests, args.prompt_len, args.output_len, args.rate, args.seed)
    for line in workload_lines(arrivals):
        print(line)
    return 0


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def _bounds(text: str) -> tuple[int, int]:
    """Reads "LOW:HIGH", or one number for both."""
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1] <= _MAX_LENGTH:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no range of lengths; write for example 32:512, or 100"
        )
    return bounds


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not _MIN_RATE <= rate < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no rate; write requests per second, at least {_MIN_RATE:g}"
        )
    return rate
