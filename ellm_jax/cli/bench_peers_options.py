"""The options of `ellm bench peers`."""

from __future__ import annotations

import argparse
import sys

from ellm_jax.bench.peers.catalogue import PEERS, PRECISIONS
from ellm_jax.cli import bench_options, options


def add(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    options.add_model_option(parser)
    parser.add_argument(
        "--peer",
        action="append",
        choices=list(PEERS),
        metavar="NAME",
        help=f"an engine: {', '.join(PEERS)}; may be repeated (default: all)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="what weights are kept in (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--threads",
        type=bench_options.positive,
        metavar="N",
        help="cores that each engine runs on (default: those that this process may use)",
    )
    parser.add_argument(
        "--rounds",
        type=bench_options.positive,
        default=3,
        metavar="N",
        help="starts of each engine; medians are shown (default: 3)",
    )
    parser.add_argument(
        "--ours-once",
        action="store_true",
        help="run this engine once a round, not beside each other one: shorter, and less exact "
        "where the machine's speed drifts",
    )
    parser.add_argument(
        "--timeout",
        type=bench_options.seconds,
        default=600.0,
        metavar="S",
        help="most seconds for an answer of an engine, loading included (default: 600)",
    )
    bench_options.add_run(parser, repeats=False)
    parser.add_argument("--picture", metavar="FILE", help="also draw the figures as bars")
    parser.add_argument("--quiet", action="store_true", help="only the result and errors")
    _add_workload(parser)
    _add_installation(parser)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    for flag, parse, default, metavar, text in (
        ("--alone-prompt", bench_options.positive, 128, "N", "prompt tokens of one request alone"),
        ("--alone-output", _several, 128, "N", "tokens of its answer"),
        ("--long-output", _several, 64, "N", "tokens of the long prompt's answer"),
        ("--requests", bench_options.whole, 32, "N", "requests at once; 0 leaves them out"),
        ("--prompt-len", bench_options.bounds, (32, 512), "LOW:HIGH", "tokens of their prompts"),
        ("--output-len", bench_options.bounds, (16, 256), "LOW:HIGH", "tokens of their answers"),
    ):
        shown = f"{default[0]}:{default[1]}" if isinstance(default, tuple) else default
        group.add_argument(
            flag,
            type=parse,
            default=default,
            metavar=metavar,
            help=f"{text} (default: {shown})",
        )
    group.add_argument(
        "--long-prompt",
        type=bench_options.whole,
        metavar="N",
        help="tokens of a long prompt; 0 leaves it out (default: 8192 where the model takes it)",
    )
    group.add_argument(
        "--kv-memory",
        type=bench_options.size,
        metavar="SIZE",
        help="most that engines may have for K and V, as in 64MiB (default: what requests need)",
    )


def _add_installation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("installation")
    group.add_argument(
        "--venvs",
        metavar="DIR",
        help="where environments and converted models are kept (default: a folder in the user's "
        "cache)",
    )
    group.add_argument(
        "--python",
        default=sys.executable,
        metavar="FILE",
        help="the interpreter of the environments (default: this one)",
    )
    group.add_argument(
        "--torch-index",
        default="https://download.pytorch.org/whl/cpu",
        metavar="URL",
        help='where pip also looks for a CPU build of torch; "" for nowhere (default: %(default)s)',
    )
    group.add_argument(
        "--pip-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="a further argument of pip install, as in --pip-arg=--constraint=versions.txt; may be "
        "repeated",
    )
    group.add_argument("--reinstall", action="store_true", help="make the environments anew")
    group.add_argument(
        "--install-only",
        action="store_true",
        help="install and convert, measure nothing",
    )
    group.add_argument(
        "--install-timeout",
        type=bench_options.seconds,
        default=3600.0,
        metavar="S",
        help="most seconds for installing or converting for one engine (default: 3600)",
    )


def _several(text: str) -> int:
    """Reads a whole number of at least 2."""
    value = bench_options.positive(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: a speed needs at least 2 tokens")
    return value
