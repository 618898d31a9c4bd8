"""Drives llama.cpp through its C interface: prompts in batches, then all requests a token a step.

The Python class above that interface serves one sequence; several at once are the library's own
way of serving more.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_BATCH_TOKENS = 2048
_MARGIN_TOKENS = 32
"""Room that the cache wastes on rounding, per request."""


class _Model:
    def __init__(self, settings: dict[str, Any]):
        import llama_cpp
        import numpy as np

        self._lib, self._np = llama_cpp, np
        threads = len(os.sched_getaffinity(0))
        llama_cpp.llama_backend_init()
        path = Path(settings["converted"]) / "model.gguf"
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"{path} cannot be loaded")
        options = llama_cpp.llama_context_default_params()
        requests = settings["max_requests"]
        options.n_ctx = settings["kv_tokens"]
        if not settings["kv_limited"]:
            options.n_ctx += _MARGIN_TOKENS * requests
        options.n_seq_max = requests
        options.n_batch = _BATCH_TOKENS
        options.n_threads = threads
        options.n_threads_batch = threads
        # One cache for all, so that one long request may fill it.
        if hasattr(options, "kv_unified"):
            options.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"no context of {options.n_ctx} tokens could be made")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self.precision = f"{settings['precision']} (KV float16)"
        self.versions = {"llama-cpp-python": llama_cpp.__version__}

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def generate(self, prompts: list[list[int]], output_tokens: list[int], recorder: Any) -> None:
        self._clear()
        left = list(output_tokens)
        last = [0] * len(prompts)
        lengths = [len(prompt) for prompt in prompts]

        def take(request: int, token: int) -> None:
            recorder.token(request, token)
            last[request] = token
            left[request] -= 1

        # (request, position, token, whether its logits are wanted)
        rows = [
            (request, position, token, position == len(prompt) - 1)
            for request, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(rows), _BATCH_TOKENS):
            for request, token in self._decode(rows[start : start + _BATCH_TOKENS]):
                take(request, token)
        while running := [request for request, count in enumerate(left) if count > 0]:
            step = [(request, lengths[request], last[request], True) for request in running]
            for request, token in self._decode(step):
                take(request, token)
                lengths[request] += 1

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """Computes rows of a batch; the likeliest next token of those whose logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for place, (request, position, token, wanted) in enumerate(rows):
            batch.token[place] = token
            batch.pos[place] = position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = request
            batch.logits[place] = wanted
        code = self._lib.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code} for {len(rows)} tokens")
        return [(row[0], self._likeliest(place)) for place, row in enumerate(rows) if row[3]]

    def _likeliest(self, place: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, place)
        return int(self._np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())

    def _clear(self) -> None:
        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_clear(memory, True)


def load(settings: dict[str, Any]) -> _Model:
    """Loads the converted model."""
    return _Model(settings)
