"""What steps of a model cost and need, where nobody has measured them."""

from __future__ import annotations

import math

from ellm_jax.models import param_shapes
from ellm_jax.models.config import ModelConfig
from ellm_jax.scheduler.cost import CostModel
from ellm_jax.sim.steps import NeedModel

# Arrays as wide as the residual stream that live at once in a layer: the stream, its norm, the
# output of a block, and the sum.
_STREAMS = 4
# Float32 arrays as wide as the vocabulary, per sequence.
_LOGITS = 1
_FIXED_BYTES = 1 << 20
_TINY = 1e-12


def estimated_need(model: ModelConfig, element_bytes: int) -> NeedModel:
    """What steps take beyond their arguments, from the shapes of their largest arrays.

    An estimate: XLA decides what lives at once. For exact figures, measure a model of this shape.
    """
    widest = max(model.hidden_size, model.intermediate_size, model.q_size)
    live = _STREAMS * model.hidden_size + model.q_size + 2 * model.kv_size
    live += 2 * model.intermediate_size
    # The kernels widen the rows of one matrix product at a time to float32.
    row_bytes = element_bytes * live + 4 * (widest + 16)
    return NeedModel(_FIXED_BYTES, row_bytes, 4 * _LOGITS * model.vocab_size)


def derived_cost(
    model: ModelConfig,
    weights_bytes: int,
    token_bytes: int,
    flops: float,
    memory_bytes_per_s: float,
    copy_bytes_per_s: float,
) -> CostModel:
    """The time of steps from what a machine attains, in floating-point operations and bytes of
    memory traffic per second, and between device and host. `token_bytes`: K and V of a token.

    Each step reads the weights once and computes two operations per parameter and token; attention
    computes four operations per pair, head and dimension, and a decode reads the K and V of its
    context. Computing and reading are added up although they overlap, so that small prefills come
    out up to two times too slow; a measured cost is better.
    """
    parameters = sum(math.prod(shape) for shape in param_shapes(model).values())
    embedding = model.vocab_size * model.hidden_size
    pair_flops = 4 * model.num_layers * model.q_size
    return CostModel(
        fixed_s=weights_bytes / memory_bytes_per_s,
        row_s=max(_TINY, 2 * (parameters - embedding) / flops),
        prefill_pair_s=pair_flops / flops,
        decode_pair_s=token_bytes / memory_bytes_per_s + pair_flops / flops,
        copy_bytes_per_s=copy_bytes_per_s,
    )
