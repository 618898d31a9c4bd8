"""The `ellm` command. A file per subcommand; what they share is in `options` and `console`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ellm_jax import __version__
from ellm_jax.cli import batch, bench, convert, doctor, generate, plan, serve, top
from ellm_jax.cli.console import Failure

_COMMANDS = (generate, batch, serve, top, bench, plan, convert, doctor)
_INTERRUPTED = 130
_NOBODY_READS = 141

_EXAMPLES = """\
examples:
  ellm generate "Once upon a time"          text from the model in the package
  ellm generate "Hello" --model ./my-model  text from a Hugging Face directory
  ellm doctor                               what this machine has, and whether all works
  ellm COMMAND --help                       options and examples of a command

exit codes: 0 done; 1 it failed; 2 what was asked makes no sense; 130 interrupted
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ellm",
        description="Generates text with language models on JAX, in exactly the memory you allow.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ellm_jax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; errors of the user are a line on stderr.

    Raises:
        SystemExit: from argparse, for --help and for arguments that it refuses.
    """
    args = _parser().parse_args(argv)
    try:
        code = int(args.run(args))
        # Here, so that a reader who has gone is noticed where it can be handled.
        sys.stdout.flush()
    except Failure as failure:
        print(f"ellm: {failure}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt:
        print("\nellm: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # As in `ellm generate ... | head -1`. What is left in the buffer must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NOBODY_READS
    except OSError as error:
        # The disk is full, a file system went away: nothing that a traceback would explain.
        print(f"ellm: {error}", file=sys.stderr)
        return 1
    return code
