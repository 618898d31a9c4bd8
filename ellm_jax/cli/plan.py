"""`ellm plan`: what each policy would make of a trace on a machine that is not there."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from ellm_jax.bench.traces import TraceRequest, WorkloadError, at_rate
from ellm_jax.cli import bench_options, options
from ellm_jax.cli.console import Failure, plain_errors, reading, write_json
from ellm_jax.config import DTYPES, KV_DTYPES, QUANTIZATIONS, format_bytes
from ellm_jax.scheduler.policy import POLICIES

if TYPE_CHECKING:
    from ellm_jax.models.config import ModelConfig
    from ellm_jax.scheduler.cost import CostModel
    from ellm_jax.sim.steps import NeedModel
    from ellm_jax.sim.world import WorldConfig

_EXAMPLES = """\
examples:
  ellm bench offline --workload w.jsonl --device-memory 1GiB --save-cost cost.json
  ellm plan --trace w.jsonl --device-memory 1GiB --cost cost.json
  ellm plan --model ./llama-3-8b --device-memory 80GiB --host-memory 64GiB \\
      --flops 200e12 --bandwidth 1.5TB --trace AzureLLMInferenceTrace_conv.csv --goodput

Nothing is loaded and nothing is computed: the engine's own scheduler and memory manager run over a
device of which only the time per step is known, by --cost as measured, or by --flops and
--bandwidth as the machine attains them. Of the model only config.json is read. Activations are
estimated from its shapes unless the cost file says what steps need.

requests/s      completed, by the time from the first arrival to the last token
inside targets  the share of requests inside both targets: --ttft-ms and --tpot-ms, or 25 times what
                the request would take alone
goodput         the highest rate of Poisson arrivals that keeps 90 % inside
"""


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="size a machine: simulate a trace under every policy",
        description="Simulates a trace on a machine of a given size, under every policy: rate, "
        "largest batch, latencies, and memory by owner.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_model_option(parser)
    bench_options.add_trace(
        parser, "--trace", required=True, help="the requests; - for standard input"
    )
    parser.add_argument(
        "--rate",
        type=bench_options.rate,
        metavar="R",
        help="requests per second; the trace's pauses are scaled (default: as in the trace)",
    )
    _add_machine(parser.add_argument_group("machine"))
    _add_engine(parser.add_argument_group("engine"))
    parser.add_argument(
        "--goodput", action="store_true", help="look for the highest rate that keeps the targets"
    )
    parser.add_argument(
        "--seed", type=bench_options.whole, default=0, metavar="N", help="of arrivals and prompts"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--json", action="store_true", help="write the result as JSON")
    parser.set_defaults(run=_run)


def _add_machine(group: Any) -> None:
    group.add_argument(
        "--device-memory",
        type=bench_options.size,
        required=True,
        metavar="SIZE",
        help="for example 80GiB",
    )
    group.add_argument(
        "--host-memory",
        type=bench_options.size,
        default=0,
        metavar="SIZE",
        help="for KV (default: 0)",
    )
    group.add_argument(
        "--cost", metavar="FILE", help="measured: what `ellm bench offline --save-cost` wrote"
    )
    group.add_argument("--flops", type=_flops, metavar="X", help="operations per second it attains")
    group.add_argument(
        "--bandwidth",
        type=bench_options.size,
        metavar="SIZE",
        help="bytes of memory per second it attains",
    )
    group.add_argument(
        "--copy-bandwidth",
        type=bench_options.size,
        metavar="SIZE",
        help="bytes per second between device and host (default: as in the cost file, or 16GB)",
    )


def _add_engine(group: Any) -> None:
    whole = bench_options.positive
    group.add_argument(
        "--policy",
        action="append",
        choices=POLICIES,
        metavar="P",
        help=f"{', '.join(POLICIES)}; may be repeated (default: all)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    group.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="of the weights (default: none)"
    )
    group.add_argument(
        "--kv-dtype", choices=KV_DTYPES, default="auto", help="of K and V (default: as --dtype)"
    )
    group.add_argument(
        "--max-model-len", type=whole, metavar="N", help="default: the model's context"
    )
    group.add_argument(
        "--max-num-seqs", type=whole, default=64, metavar="N", help="most at once (default: 64)"
    )
    group.add_argument(
        "--max-batch-tokens", type=whole, metavar="N", help="of a step (default: the policy's own)"
    )
    group.add_argument(
        "--no-prefix-caching", action="store_true", help="compute shared prefixes each time"
    )
    for name in ("ttft-ms", "tpot-ms"):
        group.add_argument(
            f"--{name}", type=bench_options.factor, metavar="X", help="target of every request"
        )


def _flops(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no speed; write for example 200e12")
    return value


def _run(args: argparse.Namespace) -> int:
    from ellm_jax.bench.planning import Targets, forecast, forecast_table

    trace = _read_trace(args)
    config = _world(args)
    targets = Targets(args.ttft_ms, args.tpot_ms)
    found = {
        policy: forecast(
            dataclasses.replace(config, policy=policy),
            trace,
            targets,
            goodput=args.goodput,
            seed=args.seed,
            progress=not args.quiet,
        )
        for policy in dict.fromkeys(args.policy or POLICIES)
    }
    if args.json:
        report = {name: dataclasses.asdict(result) for name, result in found.items()}
        machine = {
            "device_bytes": config.device_bytes,
            "host_bytes": config.host_bytes,
            "weights_bytes": config.weights_bytes,
            "cost": config.cost.to_dict(),
            "need": config.need.to_dict(),
        }
        write_json({"kind": "plan", "machine": machine, "policies": report})
    else:
        print(forecast_table(found))
    if all(result.problem for result in found.values()):
        raise Failure("no policy can run on this machine; raise --device-memory", exit_code=1)
    return 0


def _read_trace(args: argparse.Namespace) -> list[TraceRequest]:
    trace = bench_options.read_fitting(args.trace, args)
    if args.rate is None:
        return trace
    try:
        return at_rate(trace, args.rate)
    except WorkloadError as error:
        raise Failure(f"--rate: {error}") from error


def _world(args: argparse.Namespace) -> WorldConfig:
    """The machine and the engine that the options say."""
    from ellm_jax._native import KvLayout
    from ellm_jax.assembly import TINY_MODEL
    from ellm_jax.checkpoint import CheckpointError, read_config, resolve_dtype, weights_bytes
    from ellm_jax.memory.kv_format import kv_format
    from ellm_jax.sim.estimates import estimated_need
    from ellm_jax.sim.world import WorldConfig

    try:
        model = read_config(args.model or TINY_MODEL)
        dtype = resolve_dtype(model, args.dtype)
    except (CheckpointError, ValueError, OSError) as error:
        raise Failure(str(error)) from error
    max_model_len = args.max_model_len or model.max_context
    if max_model_len > model.max_context:
        raise Failure(
            f"--max-model-len {max_model_len}: the model's context is {model.max_context} tokens; "
            "ask for that or less"
        )
    held = kv_format(args.kv_dtype, dtype)
    weights = weights_bytes(model, dtype, quantization=args.quantization)
    if weights >= args.device_memory:
        raise Failure(
            f"the weights take {format_bytes(weights)} in {args.quantization or dtype}, and "
            f"--device-memory is {format_bytes(args.device_memory)}; raise it, or choose a smaller "
            "model"
        )
    with plain_errors():
        layout = KvLayout.choose(
            model.num_layers,
            model.num_kv_heads,
            model.head_dim,
            held.element_bytes,
            max_model_len,
            args.max_num_seqs,
            scale_bytes=held.scale_bytes,
        )
    need = estimated_need(model, 2 if dtype == "bfloat16" else 4)
    cost, need = _cost_and_need(args, model, weights, layout.token_bytes, need)
    return WorldConfig(
        layout=layout,
        device_bytes=args.device_memory,
        weights_bytes=weights,
        need=need,
        cost=cost,
        host_bytes=args.host_memory,
        max_batch_tokens=args.max_batch_tokens,
        prefix_caching=not args.no_prefix_caching,
    )


def _cost_and_need(
    args: argparse.Namespace, model: ModelConfig, weights: int, token_bytes: int, need: NeedModel
) -> tuple[CostModel, NeedModel]:
    from ellm_jax.scheduler.cost import CostModel
    from ellm_jax.sim.estimates import derived_cost
    from ellm_jax.sim.steps import NeedModel

    if args.cost is None:
        if args.flops is None or args.bandwidth is None:
            raise Failure(
                "how fast the machine is, is not said; give --cost FILE from `ellm bench offline "
                "--save-cost`, or --flops and --bandwidth"
            )
        copy = args.copy_bandwidth or 16 * 10**9
        return (
            derived_cost(model, weights, token_bytes, args.flops, args.bandwidth, copy),
            need,
        )
    with reading(args.cost) as file:
        try:
            values = json.load(file)
            if not isinstance(values, dict):
                raise ValueError("not a JSON object")
            if "need" in values:
                need = NeedModel(**values.pop("need"))
            if args.copy_bandwidth:
                values["copy_bytes_per_s"] = args.copy_bandwidth
            return CostModel.from_dict(values), need
        except (ValueError, TypeError, RecursionError) as error:
            raise Failure(
                f"{args.cost}: {error}; write it anew with `ellm bench offline --save-cost`"
            ) from error
