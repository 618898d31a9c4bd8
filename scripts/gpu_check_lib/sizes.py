"""What is measured: the model on a GPU, and a tiny one that a dry run gets by with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30
MIB = 1 << 20


def llama_config(
    *, hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, context: int
) -> dict[str, Any]:
    """config.json of a Llama in bfloat16."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": context,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


@dataclass(frozen=True)
class Workload:
    """A row of the paper's offline table.

    Attributes:
        label: prompt and output tokens as the paper has them.
        prompt: tokens of a prompt.
        output: tokens of an answer here, which is shorter than in the paper.
        requests: how many.
    """

    label: str
    prompt: int
    output: int
    requests: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run.

    Attributes:
        model: config.json.
        device: of `EngineConfig`.
        device_memory: of `EngineConfig`; None for its default.
        context: tokens behind which decoding is measured.
        batches: requests that decode at once; the last one is more than fits, or than is asked of
            anybody.
        prefill: tokens of the prompt whose prefill is measured.
        steps: of a measurement of decoding.
        copy_bytes, matrix: of the measurements of bandwidth and matrix rate.
        inflate_bytes: moved from activations to KV and back.
        seconds: how long steady decoding is watched.
        workloads: of the offline table.
        long_context: tokens of the longest prompts.
        max_num_seqs: most requests at once in the offline table.
        decode_len: most tokens of a request whose decoding is measured.
        uneven: needs of steps that follow each other, in bytes, to see what a memory pool makes
            of them.
    """

    model: dict[str, Any]
    device: str
    device_memory: str | None
    context: int
    batches: tuple[int, ...]
    prefill: int
    steps: int
    copy_bytes: int
    matrix: int
    inflate_bytes: int
    seconds: float
    workloads: tuple[Workload, ...]
    long_context: int
    max_num_seqs: int
    decode_len: int
    uneven: tuple[int, ...]


_GPU = Sizes(
    # Llama 3 8B; the context is that of the paper's model.
    model=llama_config(
        hidden=4096, layers=32, heads=32, kv_heads=8, inner=14336, vocab=128256, context=262144
    ),
    device="cuda",
    device_memory=None,
    context=2048,
    batches=(1, 32, 512),
    prefill=8192,
    steps=48,
    copy_bytes=2 * GIB,
    matrix=8192,
    inflate_bytes=4 * GIB,
    seconds=6.0,
    workloads=(
        Workload("8k/2k", 8192, 256, 48),
        Workload("32k/4k", 32768, 256, 12),
        Workload("16k/2k", 16384, 256, 24),
    ),
    long_context=131072,
    max_num_seqs=64,
    decode_len=8192,
    uneven=tuple(int(gib * GIB) for gib in (0.5, 0.8, 1.3, 2.1, 3.4, 1.1, 0.6, 3.0)),
)

_TINY = Sizes(
    model=llama_config(
        hidden=64, layers=2, heads=4, kv_heads=2, inner=128, vocab=512, context=2048
    ),
    device="cpu",
    device_memory="24MiB",
    context=128,
    batches=(1, 4, 16),
    prefill=256,
    steps=8,
    copy_bytes=8 * MIB,
    matrix=128,
    inflate_bytes=1 * MIB,
    seconds=0.3,
    workloads=(Workload("64/16", 64, 8, 6),),
    long_context=1024,
    max_num_seqs=4,
    decode_len=2048,
    uneven=tuple(kib << 10 for kib in (256, 400, 700, 300)),
)


def sizes(*, dry_run: bool) -> Sizes:
    """Those of a GPU, or of a dry run."""
    return _TINY if dry_run else _GPU


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A directory with nothing but config.json: the weights are random."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder
