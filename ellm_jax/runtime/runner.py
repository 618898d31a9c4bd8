"""Runs steps: packed inputs in, tokens out, everything between them on the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from ellm_jax.models.config import ModelConfig
from ellm_jax.models.decoder import Decoder
from ellm_jax.runtime import ops, sampler
from ellm_jax.runtime.batch import Span, StepLayout
from ellm_jax.runtime.failures import StepFailed
from ellm_jax.runtime.need import step_need_bytes
from ellm_jax.runtime.sampler import SamplerState, SamplingInputs
from ellm_jax.runtime.shapes import StepKey
from ellm_jax.runtime.step import StepFunction, StepResult, build_step, initial_carry

Int32Array = np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(frozen=True)
class _Step:
    call: StepFunction
    layout: StepLayout
    need_bytes: int


class Runner:
    """Owns the weights, the compiled steps, and what steps hand to each other on the device.

    Steps are dispatched from one thread. `compile` may be called from others.
    """

    def __init__(
        self, model: Decoder, config: ModelConfig, kv_id: int, num_slots: int, state_rows: int
    ):
        """Takes the loaded model; `kv_id` is the registry id of its KV cache, `state_rows` the
        length of the sampler state, the neutral row included."""
        ops.register()
        self._graph, self._weights = nnx.split(model)
        self.config = config
        self._kv_id = kv_id
        self._num_slots = num_slots
        self._steps: dict[StepKey, _Step] = {}
        self._lock = threading.Lock()
        self._carry = initial_carry(num_slots)
        self._state = sampler.init_state(state_rows, config.vocab_size)
        self._set_row: Callable[..., SamplerState] = jax.jit(sampler.set_row, donate_argnums=0)

    def compile(self, key: StepKey) -> int:
        """Compiles a step if it is not yet, and returns its need in bytes."""
        with self._lock:
            step = self._steps.get(key)
        if step is None:
            step = self._build(key)
            with self._lock:
                self._steps.setdefault(key, step)
        return step.need_bytes

    def is_compiled(self, key: StepKey) -> bool:
        """Whether the step can run without compiling."""
        with self._lock:
            return key in self._steps

    def _build(self, key: StepKey) -> _Step:
        layout = StepLayout(key.shape, self._num_slots)
        call = build_step(self._graph, layout, key.mode)
        meta = jax.ShapeDtypeStruct((layout.words,), np.int32)
        carry = jax.eval_shape(lambda: initial_carry(self._num_slots))
        rows, vocab = self.state_rows, self.config.vocab_size
        state = jax.eval_shape(lambda: sampler.init_state(rows, vocab))
        compiled = call.lower(self._weights, meta, carry, state).compile()  # type: ignore[attr-defined]
        return _Step(call, layout, step_need_bytes(compiled, self.config, key.shape))

    @property
    def state_rows(self) -> int:
        """Rows of the sampler state, the neutral one included."""
        return int(self._state.words.shape[0])

    def drop_weights(self) -> None:
        """Gives the weights' memory back; no step may run until `set_weights`."""
        # What compiling goes by stays: shapes and dtypes.
        self._weights = jax.tree.map(
            lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), self._weights
        )

    def set_weights(self, model: Decoder) -> None:
        """Takes the weights of the same model, loaded again."""
        _, self._weights = nnx.split(model)

    def set_state_row(self, row: int, words: np.ndarray, bias: np.ndarray) -> None:  # type: ignore[type-arg]
        """Replaces one row (not 0) of the sampler state."""
        assert 0 < row < self.state_rows
        self._state = self._set_row(self._state, np.int32(row), words, bias)

    def dispatch(
        self,
        key: StepKey,
        spans: Sequence[Span],
        sampling: SamplingInputs | None,
        targets: Sequence[int] | None,
    ) -> StepResult:
        """Starts a step and returns what it will give; nothing waits for it here.

        The step has to be compiled, and the KV of its spans mapped.

        Raises:
            StepFailed: it could not be started.
        """
        step = self._steps[key]
        meta: Any = step.layout.pack(self._kv_id, spans, sampling, targets)
        try:
            result, self._carry, self._state = step.call(
                self._weights, meta, self._carry, self._state
            )
        except jax.errors.JaxRuntimeError as error:
            self.recover()
            raise StepFailed(str(error)) from error
        return result

    def wait(self, result: StepResult) -> StepResult:
        """The step's results as host arrays, once they are there.

        Raises:
            StepFailed: the step ended with an error. The order of later steps is restored.
        """
        try:
            host: StepResult = jax.tree.map(np.asarray, result)
            return host
        except jax.errors.JaxRuntimeError as error:
            self.recover()
            raise StepFailed(str(error)) from error

    def recover(self) -> None:
        """Starts a fresh carry and sampler state after a failed step: what the failed one would
        have handed on does not exist."""
        rows = self.state_rows
        del self._carry, self._state  # not to hold two of them at once
        self._carry = initial_carry(self._num_slots)
        self._state = sampler.init_state(rows, self.config.vocab_size)
