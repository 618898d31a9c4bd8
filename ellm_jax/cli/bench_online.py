"""`ellm bench online`: requests that arrive in real time, and the rate an engine keeps up with."""

from __future__ import annotations

import argparse
from typing import Any

from ellm_jax.bench.traces import TraceRequest
from ellm_jax.cli import bench_options, options
from ellm_jax.cli.console import Failure, plain_errors

_EXAMPLES = """\
examples:
  ellm bench online --prompt-len 64:512 --output-len 32 --device-memory 64MiB
  ellm bench online --rate 2 --rate 4 --policy static-chunked --policy elastic \\
      --device-memory 64MiB --host-memory 64MiB
  ellm bench online --workload mooncake_trace.jsonl --arrivals trace --max-prompt-len 512 \\
      --ttft-ms 2000 --tpot-ms 100 --repeats 3 --save online.json

Goodput is the highest rate at which 90 % of the requests have both their time to first token
(TTFT) and their time per token after it (TPOT) inside the targets. The targets are --ttft-ms and
--tpot-ms; without them, 25 times what a request takes alone, measured first: TTFT by classes of
prompt length, the shortest of all policies for all of them. Without --rate the goodput is searched
for; with --rate, latencies are measured at these rates, to the end. Compiling is done before any
clock starts.
"""


def add_kind(kinds: Any) -> None:
    """Adds the kind to the parser."""
    parser = kinds.add_parser(
        "online",
        help="latencies at a rate, and the highest rate that keeps them",
        description="Lets requests arrive in real time and finds the rate that an engine keeps up "
        "with; with several policies, each in a fresh engine, side by side.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench_options.add_trace(
        parser, help="lengths of the requests, a workload or a trace (default: random ones)"
    )
    bench_options.add_lengths(
        parser, prompt=(64, 256), output=(32, 64), tokens_of="without a file: tokens of a random"
    )
    parser.add_argument(
        "--rate",
        type=bench_options.rate,
        action="append",
        metavar="R",
        help="measure at so many requests per second; may be repeated",
    )
    parser.add_argument(
        "--stop-at-miss",
        action="store_true",
        help="take the rates from the lowest up, and none above one that a policy misses",
    )
    parser.add_argument(
        "--sweep", action="store_true", help="look for the goodput beside given rates too"
    )
    parser.add_argument(
        "--arrivals",
        choices=("poisson", "trace"),
        default="poisson",
        help="a Poisson process, or as in the file, its pauses scaled to the rate "
        "(default: poisson)",
    )
    parser.add_argument(
        "--duration",
        type=bench_options.seconds,
        default=30.0,
        metavar="S",
        help="seconds for which requests arrive at each rate (default: 30)",
    )
    parser.add_argument(
        "--min-requests",
        type=bench_options.positive,
        default=20,
        metavar="N",
        help="but at least so many (default: 20)",
    )
    parser.add_argument(
        "--slo-factor",
        type=bench_options.factor,
        default=25.0,
        metavar="X",
        help="targets are so many times the latency alone (default: 25)",
    )
    parser.add_argument(
        "--attainment",
        type=bench_options.share,
        default=0.9,
        metavar="X",
        help="the share of requests that has to be inside both (default: 0.9)",
    )
    bench_options.add_run(parser)
    bench_options.add_engine(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ellm_jax.bench.compare import workload_summary
    from ellm_jax.bench.goodput import Question, measure_online, online_table
    from ellm_jax.bench.online import Load

    requests = _requests(args)
    make = bench_options.engine_maker(args)
    config = options.engine_config(args)
    question = Question(
        Load(requests, args.duration, args.min_requests, args.arrivals == "poisson"),
        rates=args.rate or (),
        stop_at_miss=args.stop_at_miss,
        sweep=args.sweep or not args.rate,
        factor=args.slo_factor,
        ttft_ms=config.ttft_ms,
        tpot_ms=config.tpot_ms,
        attainment=args.attainment,
        repeats=args.repeats,
        seed=args.seed,
    )
    with plain_errors():
        found = measure_online(
            make,
            bench_options.chosen_policies(args),
            question,
            progress=bench_options.shows_progress(args),
        )
    report = {
        "kind": "online",
        "label": bench_options.label(args, requests),
        "workload": workload_summary(requests),
        **found.to_dict(),
    }
    bench_options.publish(args, report, online_table(found))
    return 0


def _requests(args: argparse.Namespace) -> list[TraceRequest]:
    from ellm_jax.bench.workload import make_workload

    if args.workload is not None:
        return bench_options.read_requests(args)
    if args.arrivals == "trace":
        raise Failure("--arrivals trace needs a file of requests; give one with --workload")
    return list(make_workload(256, args.prompt_len, args.output_len, None, args.seed))
