"""`ellm bench offline`: a workload through an engine of each policy."""

from __future__ import annotations

import argparse
from typing import Any

from ellm_jax.cli import bench_options
from ellm_jax.cli.console import Failure, note, plain_errors, write_json

_EXAMPLES = """\
examples:
  ellm bench offline --workload w.jsonl --device-memory 64MiB
  ellm bench offline --model ./my-model --workload w.jsonl --device-memory 8GiB --json
  ellm bench workload --requests 8 | ellm bench offline --workload -
  ellm bench offline --workload w.jsonl --device-memory 64MiB --policy static --policy elastic \\
      --repeats 3 --save result.json
  ellm bench offline --workload AzureLLMInferenceTrace_conv.csv --limit 100 \\
      --max-prompt-len 512 --max-output-len 128

A line of the workload: {"arrival_s": 0.5, "prompt_len": 128, "output_len": 64}, or with
"prompt_token_ids" in place of "prompt_len"; or one of the trace formats in `ellm bench --help`.
Arrivals are kept in real time. Compiling is done before the clock starts.

total tokens/s      tokens of prompts and answers by the wall time
decoding tokens/s   tokens after each request's first, by the time in which at least one request
                    was between its first and its last token. Whatever happens meanwhile counts:
                    a policy gains nothing by letting a request that has begun stand still.
  in its steps      the same tokens by the time of the steps that decoded any, whatever else they
                    did: without the steps that only prefilled
largest batch       most requests that ran at once
"""


def add_kind(kinds: Any) -> None:
    """Adds the kind to the parser."""
    parser = kinds.add_parser(
        "offline",
        help="run a workload in this process",
        description="Runs a workload in this process and says how it went; with several policies, "
        "each in a fresh engine, side by side.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench_options.add_trace(
        parser, required=True, help="the requests, a workload or a trace; - for standard input"
    )
    bench_options.add_run(parser)
    parser.add_argument(
        "--save-cost",
        metavar="FILE",
        help="write what the engine learned about the time of steps, for `ellm plan`; of the last "
        "policy",
    )
    bench_options.add_engine(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ellm_jax.bench.compare import compare_offline, table, workload_summary

    requests = bench_options.read_requests(args)
    policies = bench_options.chosen_policies(args)
    make = bench_options.engine_maker(args)
    with plain_errors():
        results = compare_offline(
            make,
            policies,
            requests,
            repeats=args.repeats,
            seed=args.seed,
            progress=bench_options.shows_progress(args),
        )
    report = {
        "kind": "offline",
        "label": bench_options.label(args, requests),
        "workload": workload_summary(requests),
        "policies": {policy: found.to_dict() for policy, found in results.items()},
    }
    timelines = {policy: found.timeline for policy, found in results.items()}
    bench_options.save(args.save, {**report, "timelines": timelines})
    bench_options.save(args.save_cost, results[policies[-1]].cost)
    if not args.json:
        print(table({policy: found.median for policy, found in results.items()}))
    elif args.policy is None:
        # One engine as it comes: its figures alone, as before there were policies to compare.
        write_json(results[policies[0]].median)
    else:
        write_json(report)
    for policy, found in results.items():
        if found.compile_s >= 0.001:
            note(f"ellm: {policy}: {found.compile_s:.2f} s of this were spent on compiling")
    errors = [error for found in results.values() for error in found.errors]
    if errors:
        raise Failure(f"{len(errors)} requests failed: {errors[0]}", exit_code=1)
    return 0
