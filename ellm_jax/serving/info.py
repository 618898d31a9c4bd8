"""What a service says about its model and about itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ellm_jax.engine import Engine
from ellm_jax.loop_stats import Load, LoopStats


@dataclass(frozen=True)
class ModelInfo:
    """The model that is served.

    Attributes:
        name: what clients call it.
        family: such as "llama".
        dtype: what it computes in.
        quantization: of its weights; None for none.
        vocab_size: tokens that it knows.
        max_model_len: most tokens of prompt and output together.
        max_num_seqs: most completions that run at once.
        has_tokenizer: whether it takes texts; token ids it always takes.
        has_chat_template: whether it takes chats.
        created_s: when this server began, in seconds since 1970.
    """

    name: str
    family: str
    dtype: str
    quantization: str | None
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    has_tokenizer: bool
    has_chat_template: bool
    created_s: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, engine: Engine, name: str) -> ModelInfo:
        """Reads it off an engine."""
        tokenizer = engine.tokenizer
        return cls(
            name=name or "ellm",
            family=engine.model_config.family,
            dtype=engine.dtype,
            quantization=engine.config.quantization,
            vocab_size=engine.model_config.vocab_size,
            max_model_len=engine.max_model_len,
            max_num_seqs=engine.config.max_num_seqs,
            has_tokenizer=tokenizer is not None,
            has_chat_template=tokenizer is not None and bool(tokenizer.chat_templates),
        )


@dataclass(frozen=True)
class ServiceStats:
    """What a service has to do just now.

    Attributes:
        open_streams: calls that are not over, or whose client still reads.
        queued: completions that wait before the engine.
        queued_by_tenant: the same by tenant.
        open_by_tenant: open calls by tenant.
        engine: completions in the engine.
        loop: what the engine's loop did since its start.
        live, ready, draining, asleep: its state.
    """

    open_streams: int
    queued: int
    queued_by_tenant: Mapping[str, int]
    open_by_tenant: Mapping[str, int]
    engine: Load
    loop: LoopStats
    live: bool
    ready: bool
    draining: bool
    asleep: bool
