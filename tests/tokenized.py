"""Gives a random-weight checkpoint a tokenizer in which every token is a word: "w0", "w1", ..."""

import json
import shutil
from pathlib import Path

import hf_checkpoints
import tokenizers
from tokenizers import models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}w3"
)


def add_tokenizer(checkpoint: Path, target: Path) -> Path:
    """Copies a checkpoint to `target`, with tokenizer.json and a chat template."""
    shutil.copytree(checkpoint, target)
    words = {f"w{i}": i for i in range(hf_checkpoints.VOCAB)}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(target / "tokenizer.json"))
    config = {"chat_template": CHAT_TEMPLATE}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target
