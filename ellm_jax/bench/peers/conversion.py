"""A checkpoint in the engines' own formats, converted once and kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ellm_jax.bench.peers.catalogue import CHILD, Peer
from ellm_jax.bench.peers.commands import clean_environment, run_logged
from ellm_jax.bench.peers.environments import python_of
from ellm_jax.bench.peers.session import PeerError

_COPIED = ("config.json", "generation_config.json", "model.safetensors.index.json")


def converted(
    peer: Peer, environment: Path, model: Path, precision: str, folder: Path, timeout_s: float
) -> Path | None:
    """Where the checkpoint lies in the engine's own format; None: it reads the checkpoint itself.

    Converting is done once for a checkpoint, a precision and a converter, in `folder`.

    Raises:
        PeerError: it cannot be converted; says what the converter said.
    """
    if peer.converter is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    key = _fingerprint(model, peer.converter)
    target = folder / f"{peer.name}-{precision}-{key}"
    if target.is_dir():
        return target
    source = folder / f"{target.name}.source"
    unfinished = folder / f"{target.name}.unfinished"
    for rest in (source, unfinished):
        shutil.rmtree(rest, ignore_errors=True)
    _write_source(model, source)
    log = folder / f"{target.name}.log"
    command = [str(python_of(environment)), "-I", str(CHILD), "convert", str(peer.converter)]
    try:
        run_logged(
            [*command, str(source), str(unfinished), precision],
            log,
            env=clean_environment() | {"HF_HUB_OFFLINE": "1"},
            timeout_s=timeout_s,
        )
        if not unfinished.is_dir():
            raise PeerError(f"the converter wrote nothing; look into {log}")
        unfinished.rename(target)
    finally:
        for rest in (source, unfinished):
            shutil.rmtree(rest, ignore_errors=True)
    return target


def _fingerprint(model: Path, converter: Path) -> str:
    """Changes with the checkpoint's files and with how they are converted."""
    digest = hashlib.sha256(converter.read_bytes())
    digest.update(Path(__file__).read_bytes())
    for path in sorted(model.iterdir()):
        if path.name == "config.json":
            digest.update(path.read_bytes())
        elif path.suffix == ".safetensors":
            state = path.stat()
            digest.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _write_source(model: Path, source: Path) -> None:
    """The checkpoint with a tokenizer in which token 7 is the word "t7".

    Requests come as token ids, but some formats cannot be without a tokenizer, and some engines
    take ids only as its words. Whatever tokenizer the checkpoint has, or none, this one does.
    """
    source.mkdir()
    for path in model.glob("*.safetensors"):
        (source / path.name).symlink_to(path.resolve())
    for name in _COPIED:
        if (model / name).is_file():
            (source / name).symlink_to((model / name).resolve())
    vocab_size = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {f"t{token}": token for token in range(vocab_size)},
            "unk_token": "t0",
        },
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= dict.fromkeys(("unk_token", "bos_token", "eos_token"), "t0")
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
