"""`ellm bench quality`: what quantised weights, and K and V in int8, cost in quality, on a text."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ellm_jax.cli import bench_options, options
from ellm_jax.cli.console import Failure, plain_errors, reading, write_json

_EXAMPLES = """\
examples:
  ellm bench quality --text book.txt --model ./my-model --quantization int8
  ellm bench quality --text book.txt --quantization int4 --window 512 --json
  ellm bench quality --text book.txt --kv-dtype int8

Reads the text twice, in windows: with the model's weights, K and V as they are, and as
--quantization and --kv-dtype say. Says the perplexity of both, and how far the log probabilities
of the text's tokens are apart.
"""


def add_kind(kinds: Any) -> None:
    """Adds the kind to the parser."""
    parser = kinds.add_parser(
        "quality",
        help="what quantised weights, K and V cost in quality",
        description="Compares perplexity and log probabilities on a text with those of weights, K "
        "and V as they are.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--text", metavar="FILE", required=True, help="UTF-8 text; - for standard input"
    )
    parser.add_argument(
        "--window",
        type=bench_options.positive,
        metavar="N",
        help="tokens that are read together (default: 1024, or as many as the model takes)",
    )
    parser.add_argument("--json", action="store_true", help="write the result as JSON")
    options.add_model_option(parser)
    options.add_engine_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ellm_jax.bench import quality
    from ellm_jax.engine import Engine

    with plain_errors():
        config = options.engine_config(args)
    plain = dataclasses.replace(config, quantization=None, kv_dtype="auto")
    if config == plain:
        raise Failure("there is nothing to compare; give --quantization int8 or --kv-dtype int8")
    with reading(args.text) as file:
        text = file.read()
    readings = []
    pieces: list[list[int]] = []
    for ours in (plain, config):
        with plain_errors(), Engine.from_pretrained(args.model, ours) as engine:
            if engine.tokenizer is None:
                raise Failure("the model has no tokenizer.json, so no text can be read with it")
            most = engine.max_model_len - 1  # a token is generated behind each window
            pieces = quality.windows(engine.tokenizer.encode(text), min(args.window or 1024, most))
            if not pieces:
                raise Failure(f"{args.text} has fewer than two tokens; give a longer text")
            readings.append(quality.read(engine, pieces))
            dtype = engine.dtype
    found = quality.compare(*readings)
    if args.json:
        write_json({"kind": "quality", "dtype": dtype, **dataclasses.asdict(found)})
    else:
        kv = "" if config.kv_dtype == "auto" else f"{config.kv_dtype} KV"
        after = ", ".join(name for name in (config.quantization, kv) if name)
        print(quality.quality_table(found, (dtype, after)))
    return 0
