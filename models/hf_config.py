"""Reading a Hugging Face config.json, as transformers 4 and 5 write it, into a ModelConfig.

Absent fields take the defaults of the family's configuration class in transformers. What would
change the mathematics and is not implemented is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ellm_jax.models.config import ModelConfig, ModelConfigError
from ellm_jax.models.hf_rope import positive_number, rope_from_hf

CHECKPOINT_DTYPES = ("float32", "bfloat16", "float16")

# Fields that change the computation, and the values at which they change nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "n_routed_experts": (None, 0, 1),
    "is_encoder_decoder": (None, False),
    "use_mrope": (None, False),
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


class HfConfig:
    """A config.json with the defaults of its family, read field by field with clear errors."""

    def __init__(self, raw: Mapping[str, Any], family: str, defaults: Mapping[str, Any]):
        """Wrap `raw`; refuse what no family supports.

        Raises:
            ModelConfigError: naming the field, its value and what is supported.
        """
        self.raw = raw
        self.family = family
        self.defaults = defaults
        for field, neutral in _REFUSED.items():
            value = raw.get(field)
            if value not in neutral:
                supported = " or ".join(repr(v) for v in neutral if v is not None) or "unset"
                raise self.unsupported(field, value, supported)

    def unsupported(self, field: str, value: object, supported: str) -> ModelConfigError:
        """The error for a field whose value is not implemented."""
        return ModelConfigError(
            f"{field}={value!r} in config.json of a {self.family} model is not supported; "
            f"supported: {supported}. Use a checkpoint without it."
        )

    def get(self, field: str) -> Any:
        """The field's value, or its default where it is absent (not where it is null)."""
        return self.raw[field] if field in self.raw else self.defaults.get(field)

    def count(self, field: str) -> int:
        """A positive integer."""
        value = self.get(field)
        if value is None:
            raise ModelConfigError(
                f"config.json has no {field}, which a {self.family} model needs. "
                "Is the file complete?"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelConfigError(
                f"{field}={value!r} in config.json must be a positive whole number."
            )
        return value

    def number(self, field: str) -> float:
        """A positive number."""
        return positive_number(field, self.get(field))

    def flag(self, field: str) -> bool:
        """True or false; null counts as false."""
        value = self.get(field)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise ModelConfigError(f"{field}={value!r} in config.json must be true or false.")
        return value

    def token_ids(self, field: str) -> tuple[int, ...]:
        """One id, a list of ids, or null."""
        value = self.get(field)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise ModelConfigError(
                f"{field}={value!r} in config.json must be a token id or a list of them."
            )
        return tuple(ids)

    def window(self) -> int:
        """The sliding window in tokens; 0 where it is null."""
        return 0 if self.get("sliding_window") is None else self.count("sliding_window")

    def windows_by_layer(self) -> tuple[int, ...]:
        """Windows as the Qwen families give them: a switch, a size, and which layers slide."""
        layers = self.count("num_hidden_layers")
        window = self.window() if self.flag("use_sliding_window") else 0
        types = self.get("layer_types")
        if types is None:
            first = self.get("max_window_layers")
            if isinstance(first, bool) or not isinstance(first, int):
                raise ModelConfigError(
                    f"max_window_layers={first!r} in config.json must be a whole number."
                )
            return tuple(window if layer >= first else 0 for layer in range(layers))
        if not isinstance(types, list) or len(types) != layers:
            raise ModelConfigError(
                f"layer_types={types!r} in config.json must list one type for each of the "
                f"{layers} layers."
            )
        for kind in types:
            if kind not in _LAYER_TYPES:
                raise self.unsupported("layer_types", kind, " and ".join(_LAYER_TYPES))
        if "sliding_attention" in types and not window:
            raise ModelConfigError(
                "layer_types in config.json has sliding_attention layers, but use_sliding_window "
                f"is {self.get('use_sliding_window')!r} and sliding_window is "
                f"{self.get('sliding_window')!r}. Set both, or make all layers full_attention."
            )
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)

    def dtype(self) -> str:
        """The dtype the checkpoint was saved in; float32 where the file does not say."""
        value = self.get("dtype") or self.get("torch_dtype") or "float32"
        name = str(value).removeprefix("torch.")
        if name not in CHECKPOINT_DTYPES:
            field = "dtype" if self.get("dtype") else "torch_dtype"
            raise self.unsupported(field, value, ", ".join(CHECKPOINT_DTYPES))
        return name

    def model_config(
        self,
        *,
        sliding_window: tuple[int, ...],
        qkv_bias: bool = False,
        o_bias: bool = False,
        mlp_bias: bool = False,
        qk_norm: bool = False,
    ) -> ModelConfig:
        """The fields that all families read alike, with those that the family decided."""
        activation = self.get("hidden_act")
        if activation not in ("silu", "swish"):  # two names of one function
            raise self.unsupported("hidden_act", activation, "'silu'")
        num_heads = self.count("num_attention_heads")
        hidden_size = self.count("hidden_size")
        if self.get("head_dim") is not None:
            head_dim = self.count("head_dim")
        elif hidden_size % num_heads == 0:
            head_dim = hidden_size // num_heads
        else:
            raise ModelConfigError(
                f"hidden_size={hidden_size} in config.json is not a multiple of "
                f"num_attention_heads={num_heads}, and there is no head_dim. Set head_dim."
            )
        kv_heads = (
            num_heads
            if self.get("num_key_value_heads") is None
            else self.count("num_key_value_heads")
        )
        rope, max_context = rope_from_hf(self.raw, self.count("max_position_embeddings"))
        bos = self.token_ids("bos_token_id")
        return ModelConfig(
            family=self.family,
            vocab_size=self.count("vocab_size"),
            hidden_size=hidden_size,
            num_layers=self.count("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=self.count("intermediate_size"),
            norm_eps=self.number("rms_norm_eps"),
            rope=rope,
            tie_embeddings=self.flag("tie_word_embeddings"),
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            mlp_bias=mlp_bias,
            qk_norm=qk_norm,
            sliding_window=sliding_window,
            activation="silu",
            max_context=max_context,
            eos_token_ids=self.token_ids("eos_token_id"),
            bos_token_id=bos[0] if bos else None,
            dtype=self.dtype(),
        )
