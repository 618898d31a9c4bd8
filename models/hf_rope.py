"""The rotary embedding of a config.json: `rope_theta` + `rope_scaling`, or `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ellm_jax.models.config import ModelConfigError, RopeConfig

_SUPPORTED = "default, linear, dynamic, llama3, yarn"
# What any supported type reads, and marks that change nothing.
_KNOWN = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
    "finetuned",
}
_THETA = 10_000.0


def positive_number(field: str, value: object) -> float:
    """`value` as a float.

    Raises:
        ModelConfigError: if it is not a positive, finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelConfigError(f"{field}={value!r} in config.json must be a positive number.")
    return float(value)


def rope_from_hf(raw: Mapping[str, Any], max_position: int) -> tuple[RopeConfig, int]:
    """The embedding and the longest context that it serves.

    "linear" and "yarn" stretch the context by their factor, so that `max_position_embeddings` may
    hold the length before stretching. "dynamic" begins to stretch past `max_position_embeddings`,
    as a function of the longest sequence so far; up to there it is the plain embedding. What a
    token means must not depend on what comes after it, so that is where the context ends.

    Args:
        raw: config.json.
        max_position: its `max_position_embeddings`.

    Raises:
        ModelConfigError: for a type or a parameter that is not supported, by name.
    """
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ModelConfigError(f"rope_scaling={given!r} in config.json must be an object.")
    for name, value in given.items():
        if name not in _KNOWN or isinstance(value, Mapping):
            raise ModelConfigError(
                f"rope parameter {name}={value!r} in config.json is not supported; supported are "
                f"the parameters of the types {_SUPPORTED}. Use a checkpoint without it."
            )
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ModelConfigError(
            f"partial_rotary_factor={given['partial_rotary_factor']!r} in the rope parameters of "
            "config.json is not supported; supported: 1. Use a checkpoint without it."
        )
    rope = _Rope(given, raw, max_position)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=rope.theta), max_position
    if kind == "dynamic":
        rope.number("factor")
        return RopeConfig(theta=rope.theta), max_position
    if kind == "linear":
        return rope.linear()
    if kind == "llama3":
        return rope.llama3(), max_position
    if kind == "yarn":
        return rope.yarn()
    raise ModelConfigError(
        f"rope_type={kind!r} in config.json is not supported; supported: {_SUPPORTED}. "
        "Use a checkpoint with one of these."
    )


class _Rope:
    """The parameters of one embedding, read by type."""

    def __init__(self, given: Mapping[str, Any], raw: Mapping[str, Any], max_position: int):
        self.given = given
        self.max_position = max_position
        theta = given.get("rope_theta")
        self.theta = positive_number(
            "rope_theta", raw.get("rope_theta", _THETA) if theta is None else theta
        )
        # Some checkpoints keep the length before stretching beside the rope parameters; where
        # they do it is the one that counts.
        original = raw.get("original_max_position_embeddings")
        if original is None:
            original = given.get("original_max_position_embeddings")
        if original is None:
            original = max_position
        self.original = int(positive_number("original_max_position_embeddings", original))

    def number(self, name: str) -> float:
        if self.given.get(name) is None:
            kind = self.given.get("rope_type") or self.given.get("type")
            raise ModelConfigError(
                f"the rope parameters in config.json have no {name}, which rope_type={kind!r} "
                "needs. Is the file complete?"
            )
        return positive_number(name, self.given[name])

    def optional(self, name: str, default: float) -> float:
        value = self.given.get(name)
        return default if value is None else positive_number(name, value)

    def linear(self) -> tuple[RopeConfig, int]:
        factor = self.number("factor")
        rope = RopeConfig(theta=self.theta, scaling="linear", factor=factor)
        return rope, max(self.max_position, int(self.max_position * factor))

    def llama3(self) -> RopeConfig:
        low, high = self.number("low_freq_factor"), self.number("high_freq_factor")
        if high <= low:
            raise ModelConfigError(
                f"high_freq_factor={high} in config.json must be greater than "
                f"low_freq_factor={low}."
            )
        return RopeConfig(
            theta=self.theta,
            scaling="llama3",
            factor=self.number("factor"),
            original_context=self.original,
            low_freq_factor=low,
            high_freq_factor=high,
        )

    def yarn(self) -> tuple[RopeConfig, int]:
        factor = (
            self.max_position / self.original
            if self.given.get("factor") is None
            else self.number("factor")
        )
        rope = RopeConfig(
            theta=self.theta,
            scaling="yarn",
            factor=factor,
            original_context=self.original,
            beta_fast=self.optional("beta_fast", 32.0),
            beta_slow=self.optional("beta_slow", 1.0),
            truncate=bool(self.given.get("truncate", True)),
            attention_factor=self._yarn_attention_factor(factor),
        )
        return rope, max(self.max_position, int(self.original * factor))

    def _yarn_attention_factor(self, factor: float) -> float:
        """Given, or as the paper suggests: it grows with the logarithm of the stretch."""

        def suggested(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        if self.given.get("attention_factor") is not None:
            return self.number("attention_factor")
        numerator, denominator = self.given.get("mscale"), self.given.get("mscale_all_dim")
        if numerator and denominator:
            return suggested(self.number("mscale")) / suggested(self.number("mscale_all_dim"))
        return suggested(1.0)
