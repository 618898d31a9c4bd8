"""A step that several devices run together: each on its part of the weights, with its own KV."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from ellm_jax.models.collectives import on_each
from ellm_jax.runtime.step import StepFunction, StepResult


def on_all(
    step: StepFunction,
    mesh: Mesh,
    weights: Any,
    compiler_options: Mapping[str, bool | str] | None = None,
    *,
    masked: bool = False,
) -> StepFunction:
    """The step on every device of a mesh, as one program. Carry and sampler state are donated.
    `masked` says whether it takes a mask.

    Weights come divided as they lie. Everything else is whole on each device, results too: all of
    them sample from the same scores by the same operations, so that each has the token that it
    embeds next, and the host reads those of one.
    """
    whole = PartitionSpec()
    others = 4 if masked else 3
    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(jax.tree.map(lambda w: w.sharding.spec, weights), *[whole] * others),
        out_specs=whole,
        # What is whole on each device is so by the model's collectives, which nobody can tell from
        # custom calls.
        check_vma=False,
    )
    everywhere = on_each(mesh)
    divided = jax.tree.map(lambda w: w.sharding, weights)
    return jax.jit(
        step,
        in_shardings=(divided, *[everywhere] * others),
        out_shardings=everywhere,
        donate_argnums=(2, 3),
        compiler_options=None if compiler_options is None else dict(compiler_options),
    )


def wait_everywhere(result: StepResult) -> None:
    """Waits until the step is over on every device, well or not: nobody touches its memory then."""
    for shard in result.tokens.addressable_shards:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            shard.data.block_until_ready()
