"""`ellm serve`: one engine for many clients, over gRPC and OpenAI-compatible HTTP."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ellm_jax.cli import options
from ellm_jax.cli.console import Failure, note, plain_errors, write_json

if TYPE_CHECKING:
    from ellm_jax.serving.run import Listening
    from ellm_jax.serving.settings import ServeConfig

_EXAMPLES = """\
examples:
  ellm serve --model ./my-model --http 127.0.0.1:8000 --grpc 127.0.0.1:50051
  ellm serve --grpc 127.0.0.1:50051 --device-memory 2GiB --host-memory 1GiB
  ellm serve --http 0.0.0.0:8000 --api-keys-file keys.json --admin-key-file admin.key \\
      --tls-cert server.pem --tls-key server.key
  grpcurl -plaintext -d '{"text": "Once upon a time"}' 127.0.0.1:50051 \\
      ellm.v1.EngineService/GenerateStream

keys.json maps tenants to their keys: {"alice": "...", "bob": "..."}. A key is made with:
openssl rand -hex 32. On addresses that other machines reach, keys are needed.
SIGTERM lets open calls end (--drain-s), a second one ends them.
"""

_FILES = ("api_keys", "admin_key")
"""Fields that are read from files: what stands on a command line is seen by all."""


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "serve",
        help="serve a model to many clients",
        description="Serves a model over HTTP, as OpenAI's API, and over gRPC until it is stopped.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_model_option(parser)
    parser.add_argument("--json", action="store_true", help="say as JSON where it listens")
    options.add_serve_options(parser, leave_out=_FILES)
    keys = parser.add_argument_group("keys")
    keys.add_argument(
        "--api-keys-file", metavar="FILE", help="JSON with a key for each tenant; all need one then"
    )
    keys.add_argument(
        "--admin-key-file",
        metavar="FILE",
        help="a file with the key of who may resize, sleep and wake; without, nobody may",
    )
    options.add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    try:
        import uvloop

        from ellm_jax.serving.logs import log_json
        from ellm_jax.serving.run import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("ellm_jax"):
            raise
        raise Failure(
            f"serving needs packages that are not here ({error}); install them with: "
            "pip install 'ellm-jax[serve]'"
        ) from error
    from ellm_jax.engine import Engine

    with plain_errors():
        config = _serve_config(args)
        if config.grpc is None and config.http is None:
            raise Failure(
                "there is no address; give --http 127.0.0.1:8000, --grpc 127.0.0.1:50051, or both"
            )
        engine_config = options.engine_config(args)
        engine = Engine.from_pretrained(args.model, engine_config)

    def tell(listening: Listening) -> None:
        if args.json:
            write_json(listening.addresses)
        else:
            shown = ", ".join(f"{name} on {a}" for name, a in listening.addresses.items())
            note(f"serving {config.model_name}: {shown}", quiet=not engine_config.progress)

    log_json(config.log_level)
    with engine, plain_errors():
        return int(uvloop.run(serve(engine, config, on_listening=tell)))


def _serve_config(args: argparse.Namespace) -> ServeConfig:
    from ellm_jax.serving.settings import read_keys

    config = options.serve_config(
        args,
        api_keys=read_keys(args.api_keys_file) if args.api_keys_file else {},
        admin_key=Path(args.admin_key_file).read_text().strip() if args.admin_key_file else None,
    )
    if config.model_name:
        return config
    name = "tiny" if args.model is None else Path(args.model).resolve().name
    return dataclasses.replace(config, model_name=name)
