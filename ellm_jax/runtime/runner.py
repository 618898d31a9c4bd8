"""Runs steps: packed inputs in, tokens out, everything between them on the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from ellm_jax.models.collectives import mesh_of, on_each
from ellm_jax.models.config import ModelConfig
from ellm_jax.models.decoder import Decoder
from ellm_jax.runtime import sampler
from ellm_jax.runtime.backend import Backend, native_backend
from ellm_jax.runtime.batch import Span, StepLayout
from ellm_jax.runtime.failures import StepFailed
from ellm_jax.runtime.need import step_need_bytes
from ellm_jax.runtime.sampler import SamplerState, SamplingInputs
from ellm_jax.runtime.shapes import StepKey
from ellm_jax.runtime.spmd import on_all, wait_everywhere
from ellm_jax.runtime.step import (
    Sampling,
    StepCarry,
    StepFunction,
    StepResult,
    build_step,
    initial_carry,
    on_one,
)
from ellm_jax.structured.matcher import mask_words


@dataclass(frozen=True)
class _Step:
    greedy: StepFunction  # when no row asks for more
    sampled: StepFunction
    layout: StepLayout
    need_bytes: int


class Runner:
    """Owns the weights, the compiled steps, and what steps hand to each other on the device.

    Steps are dispatched from one thread. `compile` may be called from others.
    """

    def __init__(
        self,
        model: Decoder,
        config: ModelConfig,
        kv_id: int,
        num_slots: int,
        state_rows: int,
        backend: Backend | None = None,
    ):
        """Takes the loaded model; `kv_id` is the registry id of its KV cache, `state_rows` the
        length of the sampler state, the neutral row included. `backend` is that of the CPU unless
        given; a model that is divided among devices comes with one whose placement is all of
        them."""
        self._backend = native_backend() if backend is None else backend
        self._mesh = mesh_of(self._backend.placement)
        self._graph, self._weights = nnx.split(model)
        self.config = config
        self._kv_id = kv_id
        self._num_slots = num_slots
        self._steps: dict[StepKey, _Step] = {}
        self._lock = threading.Lock()
        self._carry, self._state = self._fresh(state_rows)
        self._set_row: Callable[..., SamplerState] = jax.jit(
            sampler.set_row,
            donate_argnums=0,
            out_shardings=None if self._mesh is None else on_each(self._mesh),
        )

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
        if self._backend.prepare is not None:
            self._backend.prepare(self.config, key.shape)
        if not self._backend.host_skips:
            call, need_bytes = self._compiled(key, layout, "any")
            return _Step(call, call, layout, need_bytes)
        greedy, least_bytes = self._compiled(key, layout, "greedy")
        sampled, need_bytes = self._compiled(key, layout, "all")
        return _Step(greedy, sampled, layout, max(least_bytes, need_bytes))

    def _compiled(
        self, key: StepKey, layout: StepLayout, sampling: Sampling
    ) -> tuple[StepFunction, int]:
        """A step's function, compiled, and what it needs in bytes."""
        backend = self._backend
        step = build_step(
            self._graph, layout, key.mode, backend.make_ops, sampling, backend.likeliest
        )
        options = self._backend.compiler_options
        if self._mesh is None:
            call = on_one(step, options)
        else:
            call = on_all(step, self._mesh, self._weights, options, masked=key.mode.masked)
        meta = jax.ShapeDtypeStruct((layout.words,), np.int32)
        rows, vocab = self.state_rows, self.config.vocab_size
        carry = self._abstract(jax.eval_shape(lambda: initial_carry(self._num_slots)))
        state = self._abstract(jax.eval_shape(lambda: sampler.init_state(rows, vocab)))
        masks = []
        if key.mode.masked:
            masks = [jax.ShapeDtypeStruct((key.shape.seqs, mask_words(vocab)), np.int32)]
        compiled = call.lower(self._weights, meta, carry, state, *masks).compile()  # type: ignore[attr-defined]
        extra_bytes = self._backend.extra_bytes(self.config, key.shape)
        extra_bytes += sum(mask.size * mask.dtype.itemsize for mask in masks)
        return call, step_need_bytes(compiled, extra_bytes)

    def _fresh(self, state_rows: int) -> tuple[StepCarry, SamplerState]:
        """What the first step is handed."""

        def make() -> tuple[StepCarry, SamplerState]:
            carry = initial_carry(self._num_slots)
            return carry, sampler.init_state(state_rows, self.config.vocab_size)

        if self._backend.placement is None:
            return make()
        placed: tuple[StepCarry, SamplerState]
        placed = jax.jit(make, out_shardings=self._backend.placement)()
        return placed

    def _abstract(self, tree: Any) -> Any:
        """Shapes and dtypes, and where the arrays lie if that is not JAX's default."""
        placement = self._backend.placement
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), tree
        )

    @property
    def state_rows(self) -> int:
        """Rows of the sampler state, the neutral one included."""
        return int(self._state.words.shape[0])

    def drop_weights(self) -> None:
        """Gives the weights' memory back; no step may run until `set_weights`."""
        # What compiling goes by stays.
        if self._mesh is None:
            self._weights = self._abstract(self._weights)
        else:
            self._weights = jax.tree.map(
                lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding),
                self._weights,
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
        allowed: np.ndarray[tuple[int, int], np.dtype[np.int32]] | None = None,
    ) -> StepResult:
        """Starts a step and returns what it will give; nothing waits for it here.

        The step has to be compiled, and the KV of its spans mapped. `allowed` is the mask of a
        masked step; nobody may write to it afterwards.

        Raises:
            StepFailed: it could not be started.
        """
        step = self._steps[key]
        packed = step.layout.pack(self._kv_id, spans, sampling, targets)
        if self._backend.check is not None:
            try:
                self._backend.check(packed)
            except (RuntimeError, ValueError) as error:
                raise StepFailed(str(error)) from error
        call = step.greedy if sampling is None else step.sampled
        host: list[Any] = [packed] if allowed is None else [packed, allowed]
        try:
            result, self._carry, self._state = call(
                self._weights, host[0], self._carry, self._state, *host[1:]
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
            if self._mesh is not None:
                jax.block_until_ready(result)  # what is read below is one device's
            host: StepResult = jax.tree.map(np.asarray, result)
            return host
        except jax.errors.JaxRuntimeError as error:
            if self._mesh is not None:
                wait_everywhere(result)
            self.recover()
            raise StepFailed(str(error)) from error

    def recover(self) -> None:
        """Starts a fresh carry and sampler state after a failed step: what the failed one would
        have handed on does not exist."""
        rows = self.state_rows
        del self._carry, self._state  # not to hold two of them at once
        self._carry, self._state = self._fresh(rows)

    def settle(self) -> None:
        """Waits for every step dispatched so far.

        Raises:
            jax.errors.JaxRuntimeError: one of them failed; `wait` will tell.
        """
        jax.block_until_ready(self._carry)
