"""Drives OpenVINO GenAI's continuous batching, its KV cache at the precision of the model."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

_HINTS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int8": "bf16", "int4": "bf16"}
_GIB = 2**30
_BLOCK_TOKENS = 32
"""Of a block of its KV cache on the CPU."""


class _Model:
    def __init__(self, settings: dict[str, Any]):
        import numpy as np
        import openvino
        import openvino_genai

        self._np, self._openvino, self._genai = np, openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        if settings["kv_limited"]:
            scheduler.num_kv_blocks = settings["kv_tokens"] // _BLOCK_TOKENS
        else:
            scheduler.cache_size = -(-settings["kv_bytes"] // _GIB)
        scheduler.max_num_seqs = settings["max_requests"]
        scheduler.enable_prefix_caching = False
        hint = _HINTS[settings["precision"]]
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            settings["converted"],
            scheduler,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
                "INFERENCE_PRECISION_HINT": hint,
                "KV_CACHE_PRECISION": hint,
            },
        )
        self._next = 0
        self.precision = f"{settings['precision']} (KV {hint})"
        self.versions = {name: version(name) for name in ("openvino-genai", "openvino")}

    def warm_up(self) -> None:
        """Loading compiled it."""

    def generate(self, prompts: list[list[int]], output_tokens: list[int], recorder: Any) -> None:
        handles = []
        for prompt, count in zip(prompts, output_tokens, strict=True):
            config = self._genai.GenerationConfig()
            config.max_new_tokens = count
            config.ignore_eos = True
            config.do_sample = False
            tokens = self._openvino.Tensor(self._np.array([prompt], self._np.int64))
            handles.append(self._pipeline.add_request(self._next, tokens, config))
            self._next += 1
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for index, handle in enumerate(handles):
                if handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            recorder.token(index, token)


def load(settings: dict[str, Any]) -> _Model:
    """Compiles the converted model."""
    return _Model(settings)
