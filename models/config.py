"""What a decoder is, in numbers: the frozen configuration that every part of the engine reads."""

from __future__ import annotations

from dataclasses import dataclass


class ModelConfigError(ValueError):
    """A model configuration that is invalid, or asks for something that is not implemented."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is stretched.

    Attributes:
        theta: base of the geometric series of wavelengths.
        scaling: "none", "linear" (every frequency divided by `factor`), "llama3" (long wavelengths
            divided, short ones kept, a ramp between) or "yarn" (a ramp over dimensions, and
            cos/sin multiplied by `attention_factor`).
        factor: the stretch; 1 where there is no scaling.
        original_context: tokens of context before stretching; used by "llama3" and "yarn".
        low_freq_factor, high_freq_factor: ends of the ramp of "llama3".
        beta_fast, beta_slow: ends of the ramp of "yarn", in rotations over the original context.
        truncate: whether "yarn" rounds the ends of its ramp to whole dimensions.
        attention_factor: multiplies cos and sin; 1 except for "yarn".
    """

    theta: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Hashable, so that it can be a static argument of jit.

    Attributes:
        family: "llama", "mistral", "qwen2" or "qwen3".
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        num_layers, num_heads, num_kv_heads: `num_heads` is a multiple of `num_kv_heads`.
        head_dim: even; `num_heads * head_dim` need not be `hidden_size`.
        intermediate_size: width of the gated MLP.
        norm_eps: added to the mean square in every RMSNorm.
        rope: rotary embedding.
        tie_embeddings: the output head is the embedding.
        qkv_bias, o_bias, mlp_bias: whether those projections add a bias.
        qk_norm: RMSNorm over each query and key head, before the rotary embedding.
        sliding_window: per layer, how many tokens a query sees, itself included; 0 sees all.
        activation: of the gate; always "silu".
        max_context: most tokens of prompt and output together.
        eos_token_ids: any of these ends a text.
        bos_token_id: starts a text, where the model has one.
        dtype: how the checkpoint stores its weights: "float32", "bfloat16" or "float16".
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: tuple[int, ...]
    activation: str
    max_context: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str

    def __post_init__(self) -> None:
        """Check what the fields owe each other.

        Raises:
            ModelConfigError: naming the fields that disagree.
        """
        if self.num_heads % self.num_kv_heads:
            raise ModelConfigError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}: every key-value head must serve the "
                "same number of query heads. Check config.json."
            )
        if self.head_dim % 2:
            raise ModelConfigError(
                f"head_dim={self.head_dim} is odd: the rotary embedding turns pairs of "
                "dimensions. Only even head sizes are supported."
            )
        if len(self.sliding_window) != self.num_layers:
            raise ModelConfigError(
                f"sliding_window has {len(self.sliding_window)} entries for {self.num_layers} "
                "layers: give one per layer (0 for full attention)."
            )

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim
