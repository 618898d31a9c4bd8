"""Random-weight checkpoints in the Hugging Face layout, the same on every machine, without torch.

A weight depends on nothing but the case's seed and the tensor's name, and is made from the raw
output of PCG64, whose stream numpy guarantees. `scripts/make_expectations.py` lets transformers
load these checkpoints and stores what it computes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

EXPECTATIONS = Path(__file__).parent / "expectations"
NEW_TOKENS = 64
PROMPT_TOKENS = (5, 37, 90)
VOCAB = 512
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
_SAFETENSORS_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
}


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
        family: model_type of config.json.
        fields: of config.json, beyond those that all cases share.
        rope: rope parameters as transformers 5 writes them.
        style: 4 or 5, the transformers release whose config.json is imitated.
        seed: of the weights and prompts; chosen so that greedy decoding has no near ties.
    """

    family: str
    fields: dict[str, Any]
    rope: dict[str, Any]
    style: int
    seed: int = 0


def _heads(query: int, key_value: int, head_dim: int | None, hidden: int) -> dict[str, Any]:
    heads: dict[str, Any] = {
        "num_attention_heads": query,
        "num_key_value_heads": key_value,
        "hidden_size": hidden,
    }
    return heads if head_dim is None else {**heads, "head_dim": head_dim}


_PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": 24}

CASES: dict[str, Case] = {
    "llama": Case("llama", _heads(4, 2, None, 256), _PLAIN, 5),
    "llama31_tied": Case(
        "llama", {**_heads(8, 2, 64, 128), "tie_word_embeddings": True}, _LLAMA3, 4
    ),
    "llama_mqa_head80": Case("llama", _heads(4, 1, 80, 192), _LLAMA3, 5),
    "llama_bias_linear": Case(
        "llama",
        {**_heads(4, 4, 64, 256), "attention_bias": True, "mlp_bias": True},
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
        4,
    ),
    "llama_dynamic": Case(
        "llama",
        _heads(6, 2, None, 384),
        {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
        4,
    ),
    "mistral_window": Case(
        "mistral", {**_heads(4, 2, 128, 192), "sliding_window": 16}, _PLAIN, 4, seed=2
    ),
    "mistral_full": Case("mistral", {**_heads(4, 2, None, 320), "sliding_window": None}, _PLAIN, 5),
    "qwen2_tied": Case(
        "qwen2", {**_heads(6, 2, None, 384), "tie_word_embeddings": True}, _PLAIN, 4
    ),
    "qwen2_window": Case(
        "qwen2", {**_heads(4, 1, None, 256), **_SLIDING, "max_window_layers": 1}, _PLAIN, 4
    ),
    "qwen3_head128": Case(
        "qwen3", {**_heads(4, 2, 128, 128), "tie_word_embeddings": True}, _PLAIN, 5
    ),
    "qwen3_yarn_bias": Case(
        "qwen3",
        {
            **_heads(5, 1, 64, 160),
            **_SLIDING,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        _YARN,
        5,
    ),
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def config_dict(case: Case, dtype: str = "float32") -> dict[str, Any]:
    """config.json of a case, in its style."""
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[case.family]],
        "model_type": case.family,
        "vocab_size": VOCAB,
        "intermediate_size": 224,
        "num_hidden_layers": 3,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **case.fields,
    }
    if case.style == 5:
        return {**config, "dtype": dtype, "rope_parameters": case.rope}
    scaling = {k: v for k, v in case.rope.items() if k != "rope_theta"}
    return {
        **config,
        "torch_dtype": dtype,
        "rope_theta": case.rope["rope_theta"],
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
    }


def _uniform(seed: int, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Values in [-1, 1) from the 24 highest bits of PCG64."""
    raw = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(math.prod(shape))
    unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-23)
    return (unit - np.float32(1)).reshape(shape)


def weight_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    family = config["model_type"]
    attention_bias = config.get("attention_bias", False)
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, outputs, inputs, bias in (
            ("self_attn.q_proj", heads * head_dim, hidden, attention_bias or family == "qwen2"),
            ("self_attn.k_proj", kv_heads * head_dim, hidden, attention_bias or family == "qwen2"),
            ("self_attn.v_proj", kv_heads * head_dim, hidden, attention_bias or family == "qwen2"),
            ("self_attn.o_proj", hidden, heads * head_dim, attention_bias),
            ("mlp.gate_proj", inner, hidden, config.get("mlp_bias", False)),
            ("mlp.up_proj", inner, hidden, config.get("mlp_bias", False)),
            ("mlp.down_proj", hidden, inner, config.get("mlp_bias", False)),
        ):
            yield f"{prefix}.{name}.weight", (outputs, inputs)
            if bias:
                yield f"{prefix}.{name}.bias", (outputs,)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if family == "qwen3":
            yield f"{prefix}.self_attn.q_norm.weight", (head_dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (head_dim,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def make_weights(config: dict[str, Any], seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights by tensor name, large enough that greedy decoding wanders.

    The blocks speak louder than the embedding, or a tied model would repeat its input.
    """
    weights: dict[str, NDArray[np.float32]] = {}
    for name, shape in weight_shapes(config):
        values = _uniform(seed, name, shape)
        if name.endswith("norm.weight"):
            values = np.float32(1) + values / np.float32(2)
        elif name.endswith(".bias"):
            values = values / np.float32(4)
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            values = values * np.float32(0.35)
        else:
            values = values * np.float32(2.2 / math.sqrt(shape[1]))
        weights[name] = values
    return weights


def save_safetensors(path: Path, weights: dict[str, NDArray[Any]]) -> None:
    """Write one file: the header's length, the header, the bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in weights.items():
        start, end = end, end + array.nbytes
        dtype = _SAFETENSORS_DTYPES[str(array.dtype)]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for array in weights.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write_checkpoint(
    path: Path, config: dict[str, Any], weights: dict[str, NDArray[Any]], shards: int = 1
) -> Path:
    """Write config.json and one file, or several with their index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_safetensors(path / "model.safetensors", weights)
        return path
    names = list(weights)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_safetensors(path / file, {name: weights[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.nbytes for array in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def make_checkpoint(
    tmp_path: Path,
    name: str,
    *,
    dtype: str = "float32",
    style: int | None = None,
    shards: int = 1,
) -> Path:
    """Write the checkpoint of `CASES[name]` below tmp_path and return its directory."""
    case = CASES[name]
    if style is not None:
        case = dataclasses.replace(case, style=style)
    config = config_dict(case, dtype)
    weights = {k: v.astype(DTYPES[dtype]) for k, v in make_weights(config, case.seed).items()}
    return write_checkpoint(tmp_path / name, config, weights, shards)


def prompts(name: str) -> list[list[int]]:
    """The prompts of a case: token ids from 3 up, so none is a special token."""
    made = []
    for length in PROMPT_TOKENS:
        noise = _uniform(CASES[name].seed, f"prompt {length}", (length,))
        made.append([3 + int((value + 1) / 2 * (VOCAB - 3)) for value in noise])
    return made


@dataclass(frozen=True)
class Expectation:
    """What transformers computed in float32 on a CPU.

    Attributes:
        prompt: token ids.
        tokens: the `NEW_TOKENS` greedy ones, end-of-text ignored.
        logprobs: of each of them, natural logarithm.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def expectations(name: str) -> list[Expectation]:
    """The stored expectations of a case, one per prompt."""
    stored = json.loads((EXPECTATIONS / f"{name}.json").read_text())
    return [Expectation(**item) for item in stored["prompts"]]
