"""Writing a checkpoint that loads without restacking: Orbax weights beside the small files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ellm_jax.checkpoint.directory import checkpoint_directory, read_json
from ellm_jax.checkpoint.errors import CheckpointError
from ellm_jax.checkpoint.layouts import QUANTIZATION_FIELDS
from ellm_jax.checkpoint.load import load_model, resolve_dtype, weights_bytes
from ellm_jax.checkpoint.orbax_weights import write_orbax_params
from ellm_jax.checkpoint.progress import ProgressCallback, report

_COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def convert(
    src: str | Path,
    dst: str | Path,
    dtype: str | None = None,
    progress: bool | ProgressCallback = True,
) -> Path:
    """Write the model in `src` to `dst` as an Orbax checkpoint that `load_model` reads.

    The parameters are those that `load_model(src, dtype=dtype)` gives, bit by bit, so quantised
    ones are dequantised; config.json says their dtype. Weights are written last and appear whole or
    not at all.

    Returns:
        `dst`.

    Raises:
        CheckpointError: if `src` cannot be loaded, or `dst` is not an empty or new directory.
    """
    source, target = checkpoint_directory(src), Path(dst).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"{target} exists and is not an empty directory; nothing was written. Give a new path."
        )
    model, config = load_model(source, dtype=dtype, progress=progress)
    chosen = resolve_dtype(config, dtype)
    target.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    raw = read_json(source / "config.json")
    for field in ("torch_dtype", *QUANTIZATION_FIELDS):
        raw.pop(field, None)
    (target / "config.json").write_text(json.dumps({**raw, "dtype": chosen}, indent=2) + "\n")
    total_bytes = weights_bytes(config, chosen)
    with report(progress, "Writing weights", total_bytes) as advance:
        write_orbax_params(target, model.named_params())
        advance(total_bytes)
    return target
