"""Command-line options made from the dataclasses that they fill: one place for names, kinds,
defaults and help."""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import inspect
import pathlib
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ellm_jax.config import (
    DEVICES,
    KV_DTYPES,
    LOAD_FORMATS,
    POLICY_NAMES,
    QUANTIZATIONS,
    EngineConfig,
)
from ellm_jax.sampling import MIN_TEMPERATURE, SamplingParams
from ellm_jax.serving.settings import LOG_LEVELS, ServeConfig
from ellm_jax.structured.output import StructuredOutput

_T = TypeVar("_T")

_RENAMED_SWITCHES = {"progress": "quiet"}
"""Switches whose negation has a better name than --no-..., with what they say."""
_OWN_HELP = {
    "progress": "no progress bars and no summary; only results and errors",
    "json_schema": "a file with a JSON schema; the text is JSON that follows it",
    "grammar": "a file with a grammar that the text follows, in llguidance's Lark or in GBNF",
}
_METAVARS = {
    "device_memory": "SIZE",
    "host_memory": "SIZE",
    "device": "{" + ",".join(DEVICES) + "}",
    "load_format": "{" + ",".join(LOAD_FORMATS) + "}",
    "dtype": "{float32,bfloat16}",
    "quantization": "{" + ",".join(QUANTIZATIONS) + "}",
    "kv_dtype": "{" + ",".join(KV_DTYPES) + "}",
    "policy": "{" + ",".join(POLICY_NAMES) + "}",
    "compilation_cache": "DIR",
    "http": "HOST:PORT",
    "grpc": "HOST:PORT",
    "tls_cert": "FILE",
    "tls_key": "FILE",
    "tls_client_ca": "FILE",
    "log_level": "{" + ",".join(LOG_LEVELS) + "}",
}


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """--model."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="a Hugging Face directory, or what `ellm convert` wrote (default: the small model "
        "in the package)",
    )


def add_engine_options(
    parser: argparse.ArgumentParser, leave_out: Sequence[str] = (), **defaults: Any
) -> None:
    """Options for the fields of `EngineConfig`; `defaults` replace those of the class."""
    _add(parser.add_argument_group("engine"), EngineConfig, defaults, leave_out)


def engine_config(args: argparse.Namespace, **defaults: Any) -> EngineConfig:
    """The configuration that the options say; `defaults` stand where an option was not given.

    Raises:
        ValueError: a value that the class refuses.
    """
    return _collect(args, EngineConfig, defaults)


def add_serve_options(
    parser: argparse.ArgumentParser, leave_out: Sequence[str] = (), **defaults: Any
) -> None:
    """Options for the fields of `ServeConfig`; `defaults` replace those of the class."""
    _add(parser.add_argument_group("serving"), ServeConfig, defaults, leave_out)


def serve_config(args: argparse.Namespace, **defaults: Any) -> ServeConfig:
    """The configuration that the options say; `defaults` stand where an option was not given.

    Raises:
        ValueError: a value that the class refuses.
    """
    return _collect(args, ServeConfig, defaults)


def add_sampling_options(
    parser: argparse.ArgumentParser, leave_out: Sequence[str] = (), **defaults: Any
) -> None:
    """Options for the fields of `SamplingParams`; `defaults` replace those of the class. Of its
    field `structured` they are those of `StructuredOutput`."""
    group = parser.add_argument_group("sampling")
    _add(group, SamplingParams, defaults, [*leave_out, "structured"])
    if "structured" not in leave_out:
        group = parser.add_argument_group("structured output", "One of these at most.")
        _add(group, StructuredOutput, {}, ())


def sampling_params(args: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """The parameters that the options say; `defaults` stand where an option was not given.

    Raises:
        ValueError: a value that the class refuses.
    """
    return _collect(args, SamplingParams, defaults)


def given_fields(args: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    """The fields of `cls` that options were given for."""
    prefix = f"{cls.__name__}."
    return {
        name.removeprefix(prefix): value
        for name, value in vars(args).items()
        if name.startswith(prefix)
    }


def _collect(args: argparse.Namespace, cls: type[_T], defaults: Mapping[str, Any]) -> _T:
    given = given_fields(args, cls)
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    if cls is SamplingParams and (form := given_fields(args, StructuredOutput)):
        given["structured"] = StructuredOutput(**form)
    return cls(**{**defaults, **given})


def _add(group: Any, cls: type[Any], defaults: Mapping[str, Any], leave_out: Sequence[str]) -> None:
    docs = _attribute_docs(cls)
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
            continue
        default = defaults.get(field.name, field.default)
        text = _OWN_HELP.get(field.name) or _for_terminal(docs[field.name], default)
        # SUPPRESS: only what was given reaches the namespace, the rest is the class's business.
        common = {"dest": f"{cls.__name__}.{field.name}", "default": argparse.SUPPRESS}
        flag = field.name.replace("_", "-")
        if kinds[field.name] is bool and field.name in defaults:
            # Whoever is used to the class's own default may say that, or the other.
            both = argparse.BooleanOptionalAction
            group.add_argument(f"--{flag}", action=both, help=_escaped(text), **common)
            continue
        if kinds[field.name] is bool:
            if default:
                flag = _RENAMED_SWITCHES.get(field.name, f"no-{flag}")
                if field.name not in _OWN_HELP:
                    text = f"do not {text}"
            action = "store_false" if default else "store_true"
            group.add_argument(f"--{flag}", action=action, help=_escaped(text), **common)
            continue
        if default not in (None, ""):
            text = f"{text} (default: {default})"
        parse, repeatable = _OWN_PARSERS.get(field.name) or _parser_of(kinds[field.name])
        group.add_argument(
            f"--{flag}",
            type=parse,
            action="append" if repeatable else "store",
            metavar=_METAVARS.get(field.name) or _metavar(parse),
            help=_escaped(f"{text}; may be repeated" if repeatable else text),
            **common,
        )


def _parser_of(kind: Any) -> tuple[Callable[[str], Any], bool]:
    """How one value of a field's type is read, and whether the option may be repeated."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        members = [member for member in typing.get_args(kind) if member is not type(None)]
        for member in members:
            if typing.get_origin(member) in (collections.abc.Sequence, collections.abc.Mapping):
                return _parser_of(member)
        return (str, False) if str in members else (members[0], False)
    if typing.get_origin(kind) is collections.abc.Sequence:
        return typing.get_args(kind)[0], True
    if typing.get_origin(kind) is collections.abc.Mapping:
        return _pair, True
    return kind, False


def _pair(text: str) -> tuple[int, float]:
    """Reads "ID=NUMBER"."""
    key, _, value = text.partition("=")
    try:
        return int(key), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no bias; write a token id, =, and a number, as in 42=-100"
        ) from None


def _text_of(path: str) -> str:
    """Reads a file."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read as text: {error}") from None


_OWN_PARSERS: dict[str, tuple[Callable[[str], Any], bool]] = {
    "json_schema": (_text_of, False),
    "grammar": (_text_of, False),
}


def _metavar(parse: Callable[[str], Any]) -> str:
    return {int: "N", float: "X", str: "TEXT", _pair: "ID=X", _text_of: "FILE"}[parse]


def _attribute_docs(cls: type[Any]) -> dict[str, str]:
    """What the "Attributes:" section of a docstring says about each field."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    docs: dict[str, str] = dict.fromkeys((field.name for field in dataclasses.fields(cls)), "")
    name = ""
    for line in section.splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start[1]
            docs[name] = start[2]
        elif line.startswith("     ") and name:
            docs[name] += f" {line.strip()}"
        elif line.strip():
            break
    return {name: text.replace("``", "").rstrip() for name, text in docs.items()}


def _for_terminal(text: str, default: Any) -> str:
    """Says for a command line what a docstring says for Python."""
    text = text.replace("MIN_TEMPERATURE", str(MIN_TEMPERATURE))
    text = re.sub(r"[^.]*[Kk]ept as a tuple\.", "", text)
    if default is None:
        for python, shell in (
            (". None: ", "; left out: "),
            ("None: ", "left out: "),
            (". None takes", "; left out, it takes"),
        ):
            text = text.replace(python, shell)
    else:
        text = re.sub(r"\s*None means[^.]*\.", "", text)
    text = text.strip().removesuffix(".")
    return text[:1].lower() + text[1:]


def _escaped(text: str) -> str:
    """Text in which argparse finds no formats."""
    return text.replace("%", "%%")
