"""Drives CTranslate2: one static batch, in which a request stops at its own length."""

from __future__ import annotations

import os
from typing import Any

_TYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "int8": "int8",
}


class _Model:
    def __init__(self, settings: dict[str, Any]):
        import ctranslate2

        # "auto" would choose int8; what the CPU lacks is computed in float32.
        self._generator = ctranslate2.Generator(
            settings["converted"],
            device="cpu",
            compute_type=_computed(ctranslate2, settings["precision"]),
            inter_threads=1,
            intra_threads=len(os.sched_getaffinity(0)),
        )
        self.precision = str(self._generator.compute_type).replace("_", " ")
        self.versions = {"ctranslate2": ctranslate2.__version__}

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def generate(self, prompts: list[list[int]], output_tokens: list[int], recorder: Any) -> None:
        left = list(output_tokens)

        def on_token(step: Any) -> bool:
            """Whether the request has all it asked for."""
            index = step.batch_id
            if left[index]:
                left[index] -= 1
                recorder.token(index, step.token_id)
            return not left[index]

        self._generator.generate_batch(
            [[f"t{token}" for token in prompt] for prompt in prompts],
            max_length=max(output_tokens),
            # No token ends a text.
            end_token=[],
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=on_token,
        )


def _computed(library: Any, precision: str) -> str:
    wanted = _TYPES[precision]
    there = library.get_supported_compute_types("cpu")
    return wanted if wanted in there else "float32"


def load(settings: dict[str, Any]) -> _Model:
    """Loads the converted model.

    Raises:
        ValueError: a precision that it does not know, or a limit of KV.
    """
    if settings["precision"] not in _TYPES:
        raise ValueError(f"there is no {settings['precision']} in CTranslate2 on the CPU")
    if settings["kv_limited"]:
        raise ValueError("its KV cache is as large as the batch; it takes no limit")
    return _Model(settings)
