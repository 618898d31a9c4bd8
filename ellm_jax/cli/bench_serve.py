"""`ellm bench serve`: what HTTP and gRPC cost, against the engine called directly."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ellm_jax.cli import bench_options, options
from ellm_jax.cli.console import Failure, note, plain_errors

_TRANSPORTS = ("http", "grpc")
_EXAMPLES = """\
examples:
  ellm bench serve --model ./my-model --device-memory 4GiB --max-num-seqs 64 --repeats 3
  ellm bench serve --transport grpc --streams 100 --json

Everything runs on this machine: the engine, the server in its process, and a process of clients
for each transport, which read as cheaply as they can. Output tokens per second are of --requests
at once; the time to the first token is of --alone that come one by one; then --streams clients
come at once, while the event loop and the engine's memory are watched.
"""


def add_kind(kinds: Any) -> None:
    """Adds the kind to the parser."""
    parser = kinds.add_parser(
        "serve",
        help="what serving over HTTP and gRPC costs",
        description="Measures `ellm serve` over HTTP and gRPC against the engine called directly, "
        "side by side in one process.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--transport",
        action="append",
        choices=_TRANSPORTS,
        help="may be repeated (default: both)",
    )
    for name, default, what in (
        ("requests", 64, "requests at once, for throughput"),
        ("alone", 30, "requests one by one, for the time to the first token"),
        ("alone-tokens", 128, "tokens of their prompts"),
        ("streams", 500, "clients at once, for event loop and memory"),
        ("stream-tokens", 32, "tokens of their prompts and of their answers"),
    ):
        parser.add_argument(
            f"--{name}",
            type=bench_options.positive,
            default=default,
            metavar="N",
            help=f"{what} (default: {default})",
        )
    bench_options.add_lengths(
        parser, prompt=(32, 512), output=(16, 256), tokens_of="of --requests, tokens of each"
    )
    bench_options.add_run(parser)
    options.add_model_option(parser)
    options.add_engine_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        import uvloop

        from ellm_jax.bench.serving.measure import Work, measure_serving, serving_table
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("ellm_jax"):
            raise
        raise Failure(
            f"serving needs packages that are not here ({error}); install them with: "
            "pip install 'ellm-jax[serve]'"
        ) from error
    from ellm_jax.engine import Engine

    work = Work(
        **{each.name: getattr(args, each.name) for each in dataclasses.fields(Work)},
    )
    transports = list(dict.fromkeys(args.transport or _TRANSPORTS))
    with plain_errors():
        config = options.engine_config(args)
        with Engine.from_pretrained(args.model, config) as engine:
            found = uvloop.run(
                measure_serving(
                    engine,
                    transports,
                    work,
                    rounds=args.repeats,
                    tell=lambda text: note(f"ellm: {text}", quiet=not config.progress),
                )
            )
    report = {
        "kind": "serve",
        "label": args.label or "",
        "work": dataclasses.asdict(work),
        "sides": {name: {"runs": runs} for name, runs in found.items()},
    }
    bench_options.publish(args, report, serving_table(found))
    return 0
