"""Runs planned steps on the device: from requests to the inputs of a step, and its results back."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ellm_jax.execution import Outcome
from ellm_jax.models.decoder import Decoder
from ellm_jax.request import Request
from ellm_jax.runtime.batch import Span
from ellm_jax.runtime.runner import Runner
from ellm_jax.runtime.sampler import SamplingInputs, state_row
from ellm_jax.runtime.shapes import StepKey
from ellm_jax.runtime.step import StepResult
from ellm_jax.scheduler.plan import Plan, Share
from ellm_jax.structured.matcher import mask_words


class DeviceExecutor:
    """The executor that serves: JAX on this process's device.

    Rows of sampler state (penalties, bias, min_tokens) are written when a request first has a
    share of a step, from what the host knows of it then.
    """

    def __init__(self, runner: Runner, weights_bytes: int, reload: Callable[[], Decoder]):
        """Takes the runner, the bytes of its weights, and what loads them again."""
        self._runner = runner
        self._weights_bytes = weights_bytes
        self._reload = reload
        self._free_rows = list(range(1, runner.state_rows))

    @property
    def state_rows(self) -> int:
        """Requests that may have sampler state at once."""
        return self._runner.state_rows - 1

    def dispatch(self, plan: Plan, key: StepKey) -> StepResult:
        """Starts a step and returns what it will give."""
        spans = []
        for share in plan.shares:
            request = share.request
            assert request.slot is not None
            if request.params.needs_state and not request.state_row:
                self._write_state(request)
            tokens = request.tokens(share.begin, share.begin + share.count)
            spans.append(Span(request.slot, share.begin, tokens, share.samples))
        sampling = sampling_inputs(plan.shares, key.shape.seqs)
        targets = prompt_targets(plan.shares) if key.mode.prompt_logprobs else None
        masks = None
        if key.mode.masked:
            words = mask_words(self._runner.config.vocab_size)
            masks = allowed_tokens(plan.shares, key.shape.seqs, words)
        return self._runner.dispatch(key, spans, sampling, targets, masks)

    def ready(self, handle: StepResult) -> bool:
        """Whether the step is over on the device."""
        return bool(handle.tokens.is_ready())  # type: ignore[attr-defined]

    def wait(self, handle: StepResult) -> Outcome:
        """The step's results as host arrays. Raises StepFailed."""
        result = self._runner.wait(handle)
        tokens = result.tokens.tolist()
        return Outcome(tokens, result.logprobs, result.prompt_logprobs)

    def _write_state(self, request: Request) -> None:
        request.state_row = self._free_rows.pop()
        words, bias = state_row(
            request.prompt_ids,
            request.output_ids,
            request.params,
            list(request.stop_ids),
            self._runner.config.vocab_size,
        )
        self._runner.set_state_row(request.state_row, words, bias)

    def give_back(self, request: Request) -> None:
        """A request gives its row of sampler state up. At once, even while a step in flight counts
        in it: whoever gets the row writes it anew, and the device does that after the step."""
        if request.state_row:
            self._free_rows.append(request.state_row)
            request.state_row = 0

    def sleep(self) -> int:
        """Drops the weights; they are read from the checkpoint again on `wake`."""
        self._runner.drop_weights()
        return self._weights_bytes

    def wake(self) -> None:
        """Reads the weights from the checkpoint again."""
        self._runner.set_weights(self._reload())
        gc.collect()  # Making the model leaves the weights in a cycle, which the next sleep drops.


def sampling_inputs(shares: Sequence[Share], seqs: int) -> SamplingInputs | None:
    """Host arrays for the sampled rows; None when all are greedy and stateless."""
    requests = [share.request for share in shares if share.samples]
    if all(r.params.greedy and not r.state_row for r in requests):
        return None
    params = [r.params for r in requests]
    padding = [0] * (seqs - len(requests))
    # The noise of a token depends on its index, that of the one in flight included.
    positions = [len(r.output_ids) + r.in_flight for r in requests]
    minimum = zip(positions, params, requests, strict=True)

    def floats(values: list[float], off: float) -> Any:
        return np.array(values + [off] * len(padding), np.float32)

    def ints(values: list[int]) -> Any:
        return np.array(values + padding, np.int32)

    return SamplingInputs(
        temperature=floats([p.temperature for p in params], 0.0),
        top_k=ints([max(0, p.top_k) for p in params]),
        top_p=floats([p.top_p for p in params], 1.0),
        min_p=floats([p.min_p for p in params], 0.0),
        repetition=floats([p.repetition_penalty for p in params], 1.0),
        presence=floats([p.presence_penalty for p in params], 0.0),
        frequency=floats([p.frequency_penalty for p in params], 0.0),
        seed=ints([r.seed - (1 << 32) if r.seed >> 31 else r.seed for r in requests]),
        position=ints(positions),
        row=ints([r.state_row for r in requests]),
        suppress_stop=ints(
            [int(at < p.min_tokens and _may_go_on(r)) for at, p, r in minimum],
        ),
    )


def _may_go_on(request: Request) -> bool:
    """Whether anything but a token that ends it may come next: if not, it ends, whatever
    `min_tokens` says."""
    return request.matcher is None or request.matcher.leaves_beside(request.stop_ids)


def allowed_tokens(
    shares: Sequence[Share], seqs: int, words: int
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """Which tokens the sampled rows may have, i32[seqs, words]; any where nothing says more."""
    masks = np.full((seqs, words), -1, np.int32)
    for row, request in enumerate(share.request for share in shares if share.samples):
        if request.matcher is not None:
            known = len(request.output_ids)
            assert request.in_flight == 0, f"{request.id}: what comes before is not known"
            assert request.matcher.num_tokens == known, f"{request.id}: its matcher is elsewhere"
            masks[row] = request.matcher.allowed
    return masks


def prompt_targets(shares: Sequence[Share]) -> list[int]:
    """The prompt token that follows each row, 0 where none does."""
    targets: list[int] = []
    for share in shares:
        prompt = share.request.prompt_ids
        after = list(prompt[share.begin + 1 : share.begin + 1 + share.count])
        targets += after + [0] * (share.count - len(after))
    return targets
