"""Writes a Hugging Face directory of the Llama family as GGUF, without a vocabulary.

llama.cpp rotates neighbouring pairs of a head where Hugging Face rotates halves, so the rows of the
query and key projections change places.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "int8": "Q8_0",
    "int4": "Q4_0",
}
_FILE_TYPES = {
    "bfloat16": "MOSTLY_BF16",
    "float16": "MOSTLY_F16",
    "float32": "ALL_F32",
    "int8": "MOSTLY_Q8_0",
    "int4": "MOSTLY_Q4_0",
}
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(source: str, target: str, precision: str) -> None:
    """Writes `target`/model.gguf; matrices at the precision, vectors in float32.

    Raises:
        ValueError: a model of another family, or with a scaled rotary embedding.
    """
    import gguf

    config = json.loads((Path(source) / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config.get("model_type") != "llama" or "factor" in rope:
        raise ValueError(
            f"a {config.get('model_type')!r} model is not converted, nor one with a scaled rotary "
            "embedding; plain Llama models are"
        )
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    Path(target).mkdir()
    writer = gguf.GGUFWriter(str(Path(target) / "model.gguf"), "llama")
    _add_config(writer, gguf, config, heads, kv_heads, precision)
    kind = getattr(gguf.GGMLQuantizationType, _TYPES[precision])
    for name, tensor in _tensors(Path(source)):
        if "q_proj" in name:
            tensor = _pairs(tensor, heads)
        elif "k_proj" in name:
            tensor = _pairs(tensor, kv_heads)
        if tensor.ndim == 1:
            writer.add_tensor(_gguf_name(name), tensor)
        else:
            packed = gguf.quants.quantize(tensor, kind)
            writer.add_tensor(_gguf_name(name), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(
    writer: Any, gguf: Any, config: dict[str, Any], heads: int, kv_heads: int, precision: str
) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = {**config, **(config.get("rope_parameters") or {})}
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[precision]))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, part = name.split(".", 3)
    module, _, kind = part.rpartition(".")
    if module not in _LAYER_NAMES:
        raise ValueError(f"the tensor {name} has no place in a Llama model")
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{kind}"


def _pairs(tensor: Any, heads: int) -> Any:
    """Puts the two rows of each rotated pair beside one another; [H * D, ...] as before."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _tensors(source: Path) -> Iterator[tuple[str, Any]]:
    """Names and values, in float32, of all tensors of the directory's safetensors files."""
    import numpy as np

    for path in sorted(source.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        header_bytes = struct.unpack("<Q", data[:8].tobytes())[0]
        header = json.loads(data[8 : 8 + header_bytes].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            raw = data[begin:end]
            if entry["dtype"] == "BF16":
                values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                kind = {"F16": np.float16, "F32": np.float32}[entry["dtype"]]
                values = raw.view(kind).astype(np.float32)
            yield name, values.reshape(entry["shape"])
