"""The jitted step: a ragged batch of prefill chunks and decodes, and the sampling behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ellm_jax.models.decoder import Decoder, Wanted
from ellm_jax.runtime import sampler
from ellm_jax.runtime.backend import Likeliest, OpsFactory
from ellm_jax.runtime.batch import StepLayout, Unpacked, resolve_tokens
from ellm_jax.runtime.sampler import Logprobs, SamplerState
from ellm_jax.runtime.shapes import StepMode
from ellm_jax.sampling import MAX_LOGPROBS

# Prompt rows whose logits exist at once: with a vocabulary of 128K, 16 rows take 8 MiB.
_PROMPT_ROWS = 16


class StepCarry(NamedTuple):
    """What a step hands to the next one, on the device.

    Attributes:
        epoch: i32[1], orders the steps that touch the KV memory.
        last_tokens: i32[num_slots], the token last sampled for each slot.
    """

    epoch: jax.Array
    last_tokens: jax.Array


class StepResult(NamedTuple):
    """What a step tells the host.

    Attributes:
        tokens: i32[S], of the sampled rows.
        logprobs: [S], if asked for.
        prompt_logprobs: [T], of the token after each row, if asked for.
    """

    tokens: jax.Array
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None


def initial_carry(num_slots: int) -> StepCarry:
    """The carry of the first step."""
    return StepCarry(jnp.zeros(1, jnp.int32), jnp.zeros(num_slots, jnp.int32))


StepFunction = Callable[..., tuple[StepResult, StepCarry, SamplerState]]
"""(weights, meta, carry, sampler state), and a mask if so built -> (result, carry, state)."""


Sampling = Literal["any", "greedy", "all"]
"""Which sampling work a step holds: "any" finds out while it runs what no row asks for, row by row,
"greedy" has none of it, "all" does it for all rows together."""


def build_step(
    graph: nnx.GraphDef[Decoder],
    layout: StepLayout,
    mode: StepMode,
    make_ops: OpsFactory,
    sampling: Sampling = "any",
    likeliest: Likeliest | None = None,
) -> StepFunction:
    """The step of one bucket and mode. To be compiled with `on_one`, or for several devices with
    `spmd.on_all`.

    With `likeliest`, that is what "any" runs where all rows are greedy and have no state. In a
    masked mode the step takes one more argument, which tokens the sampled rows may have
    (i32[S, ceil(V / 32)], see `sampler.sample`); in all others nothing of that is compiled.
    """
    together = sampling != "any"
    # Prompts: most rows of the last layer are of no use once their keys and values are known.
    only_last = not mode.prompt_logprobs and layout.shape.rows > layout.shape.seqs

    def step(
        weights: Any,
        meta: jax.Array,
        carry: StepCarry,
        state: SamplerState,
        allowed: jax.Array | None = None,
    ) -> tuple[StepResult, StepCarry, SamplerState]:
        assert (allowed is not None) == mode.masked, "a mask and a mode that do not go together"
        model = nnx.merge(graph, weights)
        batch = layout.unpack(meta)
        tokens = resolve_tokens(batch.tokens, carry.last_tokens)
        ops, last_ops = make_ops(meta, batch.num_rows), make_ops(meta, batch.num_samples)
        wanted = Wanted(batch.sample_rows, last_ops) if only_last else None
        hidden, epoch = model(tokens, batch.positions, ops, carry.epoch, wanted)
        last = hidden if only_last else hidden[batch.sample_rows]
        logits = model.logits(last, last_ops)
        if sampling == "greedy":
            chosen = sampler.greedy(logits, allowed, together=together)
        elif likeliest is None or mode.masked:
            chosen, state = sampler.sample(
                logits, batch.sampling, state, allowed, together=together
            )
        else:
            chosen, state = _sample_or_take(logits, batch, state, likeliest)
        result = StepResult(
            tokens=chosen,
            logprobs=sampler.logprobs(logits, chosen, MAX_LOGPROBS, together=together)
            if mode.logprobs
            else None,
            prompt_logprobs=_prompt_logprobs(model, hidden, batch.targets, meta, make_ops, together)
            if mode.prompt_logprobs
            else None,
        )
        last_tokens = carry.last_tokens.at[batch.sample_slots].set(chosen, mode="drop")
        return result, StepCarry(epoch, last_tokens), state

    return step


def _sample_or_take(
    logits: jax.Array, batch: Unpacked, state: SamplerState, likeliest: Likeliest
) -> tuple[jax.Array, SamplerState]:
    inputs = batch.sampling
    wanted = jnp.any((inputs.temperature > 0) | (inputs.row > 0))
    chosen = lax.cond(
        wanted,
        lambda: sampler.choose(logits, inputs, state),
        lambda: likeliest(logits, batch.num_samples),
    )
    return chosen, sampler.count(chosen, inputs, state)


def on_one(
    step: StepFunction, compiler_options: Mapping[str, bool | str] | None = None
) -> StepFunction:
    """The step on one device. Carry and sampler state are donated."""
    options = None if compiler_options is None else dict(compiler_options)
    return jax.jit(step, donate_argnums=(2, 3), compiler_options=options)


def _prompt_logprobs(
    model: Decoder,
    hidden: jax.Array,
    targets: jax.Array,
    meta: jax.Array,
    make_ops: OpsFactory,
    together: bool,
) -> Logprobs:
    """Log probabilities of `targets` (i32[T]) after `hidden` ([T, H]), a few rows at a time."""
    count = hidden.shape[0]
    rows = min(_PROMPT_ROWS, count)
    padding = -count % rows
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, rows, hidden.shape[-1])
    targets = jnp.pad(targets, (0, padding)).reshape(-1, rows)
    ops = make_ops(meta, jnp.full(1, rows, jnp.int32))

    def block(inputs: tuple[jax.Array, jax.Array]) -> Logprobs:
        hidden, targets = inputs
        return sampler.logprobs(model.logits(hidden, ops), targets, MAX_LOGPROBS, together=together)

    blocks = lax.map(block, (hidden, targets))
    return Logprobs(*(x.reshape(-1, *x.shape[2:])[:count] for x in blocks))
