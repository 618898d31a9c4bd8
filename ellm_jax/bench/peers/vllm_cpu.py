"""Drives vLLM's CPU build, its engine in this process: without the messages between processes it
is at its fastest."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

_DTYPES = ("bfloat16", "float16", "float32")
_GIB = 2**30


class _Model:
    def __init__(self, settings: dict[str, Any]):
        cores = sorted(os.sched_getaffinity(0))
        kv_bytes = settings["kv_bytes"]
        if not settings["kv_limited"]:
            kv_bytes = -(-kv_bytes // _GIB) * _GIB
        # It binds a thread to each core, and keeps torch at one beside them unless it is told more.
        os.environ.pop("OMP_NUM_THREADS", None)
        # Read when vLLM is imported.
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(
            model=settings["model"],
            dtype=settings["precision"],
            skip_tokenizer_init=True,
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["max_requests"],
            kv_cache_memory_bytes=kv_bytes,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self._next = 0
        self.precision = settings["precision"]
        self.versions = {name: version(name) for name in ("vllm-cpu", "torch")}

    def warm_up(self) -> None:
        """Loading compiled it."""

    def generate(self, prompts: list[list[int]], output_tokens: list[int], recorder: Any) -> None:
        engine = self._llm.llm_engine
        first = self._next
        self._next += len(prompts)
        for index, (prompt, count) in enumerate(zip(prompts, output_tokens, strict=True)):
            params = self._vllm.SamplingParams(
                temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False
            )
            engine.add_request(str(first + index), {"prompt_token_ids": prompt}, params)
        seen = [0] * len(prompts)
        while engine.has_unfinished_requests():
            for output in engine.step():
                index = int(str(output.request_id).split("-")[0]) - first
                tokens = output.outputs[0].token_ids
                for token in tokens[seen[index] :]:
                    recorder.token(index, token)
                seen[index] = len(tokens)


def load(settings: dict[str, Any]) -> _Model:
    """Starts an engine on the checkpoint.

    Raises:
        ValueError: a precision that the checkpoint would have to come in.
    """
    if settings["precision"] not in _DTYPES:
        raise ValueError(
            f"it quantises no checkpoint to {settings['precision']} while loading it on the CPU"
        )
    return _Model(settings)
