"""Drives Hugging Face transformers: one static batch, padded on the left.

A batch runs as long as its longest answer; what the shorter ones get beyond theirs is not counted.
"""

from __future__ import annotations

import os
from typing import Any

_DTYPES = ("bfloat16", "float16", "float32")


class _Streamer:
    """Passes on what `generate` gives with each step; the prompt comes first."""

    def __init__(self, output_tokens: list[int], recorder: Any):
        self._left = list(output_tokens)
        self._recorder = recorder
        self._prompt = True

    def put(self, tokens: Any) -> None:
        if self._prompt:
            self._prompt = False
            return
        for index, token in enumerate(tokens.reshape(-1).tolist()):
            if self._left[index]:
                self._left[index] -= 1
                self._recorder.token(index, token)

    def end(self) -> None:
        """The end is known from the lengths."""


class _Model:
    def __init__(self, settings: dict[str, Any]):
        import torch
        import transformers

        threads = len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"],
            dtype=getattr(torch, settings["precision"]),
            attn_implementation="sdpa",
            local_files_only=True,
        ).eval()
        # Nothing ends a text but its length: minimum lengths would forbid the token instead.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self.precision = settings["precision"]
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def generate(self, prompts: list[list[int]], output_tokens: list[int], recorder: Any) -> None:
        torch = self._torch
        longest = max(map(len, prompts))
        tokens = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with torch.inference_mode():
            self._model.generate(
                torch.tensor(tokens),
                attention_mask=torch.tensor(mask),
                max_new_tokens=max(output_tokens),
                do_sample=False,
                streamer=_Streamer(output_tokens, recorder),
            )


def load(settings: dict[str, Any]) -> _Model:
    """Loads the checkpoint.

    Raises:
        ValueError: a precision that needs another library, or a limit of KV.
    """
    if settings["precision"] not in _DTYPES:
        raise ValueError(f"there is no {settings['precision']} on the CPU without other libraries")
    if settings["kv_limited"]:
        raise ValueError("its KV cache is as large as the batch; it takes no limit")
    return _Model(settings)
