"""The model that comes with the package: small, complete, and able to tell a story."""

import json
import struct
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ellm_jax.models import checkpoint_tensors, config_from_hf

TINY = Path(str(resources.files("ellm_jax"))) / "tiny"
SIZE_BYTES_MAX = 6 * 1024 * 1024
PARAMETERS_MAX = 5_000_000


def read_json(name):
    return json.loads((TINY / name).read_text())


def tensor_shapes():
    """Shapes by name, from the header of the safetensors file alone."""
    with (TINY / "model.safetensors").open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


def test_size():
    parameters = sum(int(np.prod(shape)) for shape in tensor_shapes().values())
    assert 1_000_000 < parameters <= PARAMETERS_MAX
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= SIZE_BYTES_MAX


def test_tensors_are_those_of_the_configuration():
    config = config_from_hf(read_json("config.json"))
    expected = {place.name: place.shape for place in checkpoint_tensors(config)}
    assert tensor_shapes() == expected


def test_special_tokens_agree(tokenizer):
    config, generation = read_json("config.json"), read_json("generation_config.json")
    settings = read_json("tokenizer_config.json")
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    for role in ("bos", "eos"):
        token_id = tokenizer.token_to_id(settings[f"{role}_token"])
        assert token_id == config[f"{role}_token_id"] == generation[f"{role}_token_id"]


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, there was a fox.",
        '"Hello!" said Tom.\n\nThe end.',
        "Größe, 火, 🦊 and\ttabs  and   spaces ",
        " leading space",
    ],
)
def test_tokenizer_round_trip(tokenizer, text):
    encoded = tokenizer.encode(text)
    assert encoded.ids[0] == read_json("config.json")["bos_token_id"]
    assert tokenizer.decode(encoded.ids) == text


def test_simple_english_is_a_token_per_word(tokenizer):
    text = "Once upon a time, there was a little girl named Lily who lived in a small house."
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) <= len(text.split()) + 3


def test_chat_template_is_what_the_model_was_taught():
    settings = read_json("tokenizer_config.json")
    template = ImmutableSandboxedEnvironment().from_string(settings["chat_template"])
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Tell me a story about a fox."},
    ]
    tokens = {"bos_token": settings["bos_token"], "eos_token": settings["eos_token"]}
    assert template.render(messages=chat, add_generation_prompt=True, **tokens) == (
        "<s><|user|>\nHello!\n<|assistant|>\nHi!<|endoftext|>\n"
        "<|user|>\nTell me a story about a fox.\n<|assistant|>\n"
    )


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(TINY)


def continued(reference, ids, max_tokens=300):
    """Greedy continuation with transformers; returns the new token ids."""
    import torch

    model, _ = reference
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=max_tokens, do_sample=False)
    return out[0, len(ids) :].tolist()


def test_transformers_tokenizes_alike(reference, tokenizer):
    _, theirs = reference
    text = 'The little dog said, "Hello!"\n\nTom laughed.'
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    chat = [{"role": "user", "content": "Tell me a story about a fox."}]
    rendered = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == "<s><|user|>\nTell me a story about a fox.\n<|assistant|>\n"


@pytest.mark.slow
def test_a_story_is_english_and_ends(reference, tokenizer):
    config = read_json("config.json")
    new_ids = continued(reference, tokenizer.encode("Once upon a time").ids)
    assert config["eos_token_id"] in new_ids, "the story does not end"
    text = tokenizer.decode(new_ids)
    words = text.split()
    assert len(words) > 50
    common = {"the", "a", "and", "was", "said", "to", "it", "in"}
    assert sum(word.lower() in common for word in words) > len(words) / 8, text
    sentences = [part for part in text.split(". ") if part]
    assert len(set(sentences)) > 0.8 * len(sentences), text


@pytest.mark.slow
@pytest.mark.parametrize("animal", ["fox", "dog", "elephant"])
def test_a_chat_is_about_what_was_asked(reference, tokenizer, animal):
    prompt = f"<s><|user|>\nTell me a story about a {animal}.\n<|assistant|>\n"
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    assert animal in tokenizer.decode(continued(reference, ids))
