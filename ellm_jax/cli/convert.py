"""`ellm convert`: a checkpoint that loads without restacking."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from ellm_jax.cli.console import note, plain_errors, write_json
from ellm_jax.config import DTYPES

_EXAMPLES = """\
examples:
  ellm convert ./Llama-3.2-1B ./llama-1b
  ellm convert ./Llama-3.2-1B ./llama-1b-f32 --dtype float32
  ellm generate "Hello" --model ./llama-1b
"""


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "convert",
        help="write a Hugging Face model as an Orbax checkpoint",
        description="Reads a model directory and writes it as an Orbax checkpoint, which loads "
        "faster and gives the same numbers to the bit.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC", help="the directory to read")
    parser.add_argument("dst", metavar="DST", help="the directory to write: new, or empty")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    parser.add_argument("--json", action="store_true", help="say as JSON what was written")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    # Orbax tells at length about its own business.
    logging.getLogger("absl").setLevel(logging.ERROR)
    from ellm_jax.checkpoint import convert, read_config, weights_bytes

    with plain_errors():
        target = convert(args.src, args.dst, dtype=args.dtype, progress=not args.quiet)
        config = read_config(target)
    if args.json:
        write_json(
            {
                "path": str(target),
                "family": config.family,
                "dtype": config.dtype,
                "weights_bytes": weights_bytes(config),
            }
        )
    else:
        note(f"wrote {target}", quiet=args.quiet)
    return 0
