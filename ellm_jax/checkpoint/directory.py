"""What lies in a checkpoint directory: the configuration, and which files hold the weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ellm_jax.checkpoint.errors import CheckpointError, a_few
from ellm_jax.checkpoint.layouts import QUANTIZATION_FIELDS, layout_of
from ellm_jax.checkpoint.packed import Layout
from ellm_jax.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from ellm_jax.models import ModelConfig, ModelConfigError, config_from_hf

ORBAX_FOLDER = "orbax_weights"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def read_config(path: str | Path) -> ModelConfig:
    """Read config.json of a Hugging Face or converted directory.

    End-of-text ids that only generation_config.json names are added: there a chat model says which
    token ends a turn. Where config.json names no dtype, that of the first tensor counts.

    Raises:
        CheckpointError: if the directory or a file in it is missing or is not JSON, or weights are
            quantised in a format that is not read.
        ModelConfigError: if the model is invalid or not supported.
    """
    folder = checkpoint_directory(path)
    raw = read_json(folder / "config.json")
    layout_of(raw)
    for field in QUANTIZATION_FIELDS:
        raw.pop(field, None)
    try:
        config = config_from_hf(raw)
        if not (raw.get("dtype") or raw.get("torch_dtype")):
            config = dataclasses.replace(config, dtype=_stored_dtype(folder))
        generation = folder / "generation_config.json"
        if generation.is_file():
            config = _with_turn_ends(config, read_json(generation).get("eos_token_id"))
    except ModelConfigError as error:
        raise ModelConfigError(f"{folder}: {error}") from error
    return config


def read_layout(folder: Path) -> Layout | None:
    """How quantised weights are stored; None where they are not. See `layout_of`."""
    return None if has_orbax_weights(folder) else layout_of(read_json(folder / "config.json"))


def checkpoint_directory(path: str | Path) -> Path:
    """`path` as a directory that has a config.json.

    Raises:
        CheckpointError: if there is none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"the model directory {folder} {found}. Give the path of a local directory with "
            "config.json and safetensors files; nothing is downloaded by name."
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json; it has {_listing(folder)}. Give the directory that "
            "holds config.json beside the weights."
        )
    return folder


def has_orbax_weights(folder: Path) -> bool:
    """Whether the weights are a finished Orbax checkpoint, as `convert` writes it."""
    return (folder / ORBAX_FOLDER).is_dir()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory.

    Raises:
        CheckpointError: if there are none, or the index names one that is missing.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise CheckpointError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; it has {_listing(folder)}. Only "
            "safetensors weights are read, since other formats can run code: save the model again "
            "with safetensors."
        )
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / _INDEX} has no weight_map. Download it again.")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(
            f"{folder / _INDEX} names files outside its directory: {a_few(outside)}. Shards must "
            "lie beside the index."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder / _INDEX} names {len(names)} files, of which {len(missing)} are missing: "
            f"{a_few(missing)}. Complete the download."
        )
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if the file is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Copy it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object.")
    return value


def _with_turn_ends(config: ModelConfig, ids: Any) -> ModelConfig:
    named = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in named):
        raise ModelConfigError(
            f"eos_token_id={ids!r} in generation_config.json must be a token id or a list of them."
        )
    # dict keeps the order and drops doubles.
    return dataclasses.replace(
        config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *named)))
    )


def _stored_dtype(folder: Path) -> str:
    if has_orbax_weights(folder):
        return "float32"
    with SafetensorsFile(weight_files(folder)[0]) as file:
        stored = next((t.dtype for t in file.tensors.values() if t.dtype in DTYPES), "F32")
    return DTYPES[stored].name


def _listing(folder: Path) -> str:
    names = [entry.name for entry in folder.iterdir()]
    return a_few(names, 6) if names else "nothing"
