"""`ellm bench memory`: the largest batch that decodes behind a given context."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ellm_jax.cli import bench_options
from ellm_jax.cli.console import note, plain_errors

_EXAMPLES = """\
examples:
  ellm bench memory --context 1024 --device-memory 64MiB --max-num-seqs 128 --policy all
  ellm bench memory --context 2048 --context 8192 --model ./my-model --device-memory 2GiB \\
      --policy static --policy elastic --save memory.json

Queues one request more than --max-num-seqs, each with its own prompt of the given length, until no
further one comes in beside those that run, and watches these decode. Prefilling so much can take
long, so the prompts' memory is mapped and not computed: decoding reads as much of it, and the
answers mean nothing. With --prefill it is computed.
"""


def add_kind(kinds: Any) -> None:
    """Adds the kind to the parser."""
    parser = kinds.add_parser(
        "memory",
        help="the largest batch that decodes behind a context",
        description="Finds how many requests with a context of a given length decode at once, and "
        "how fast; with several policies, each in a fresh engine, side by side.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--context",
        type=bench_options.positive,
        action="append",
        required=True,
        metavar="N",
        help="tokens of each prompt; may be repeated",
    )
    parser.add_argument(
        "--output-len",
        type=bench_options.positive,
        default=256,
        metavar="N",
        help="tokens of each answer, enough to be watched (default: 256)",
    )
    parser.add_argument(
        "--seconds",
        type=bench_options.seconds,
        default=3.0,
        metavar="S",
        help="how long decoding is watched (default: 3)",
    )
    parser.add_argument("--prefill", action="store_true", help="compute the prompts")
    bench_options.add_run(parser, repeats=False)
    bench_options.add_engine(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ellm_jax.bench.capacity import capacity_table, compare_capacity

    make = bench_options.engine_maker(args)
    quiet = not bench_options.shows_progress(args)
    with plain_errors():
        results = compare_capacity(
            make,
            bench_options.chosen_policies(args),
            args.context,
            output_tokens=args.output_len,
            watch_s=args.seconds,
            prefill=args.prefill,
            seed=args.seed,
            tell=lambda text: note(f"ellm: {text}", quiet=quiet),
        )
    report = {
        "kind": "memory",
        "label": args.label or "",
        "prefill": args.prefill,
        "policies": {
            policy: {"runs": [dataclasses.asdict(f) for f in found]}
            for policy, found in results.items()
        },
    }
    bench_options.publish(args, report, capacity_table(results))
    return 0
