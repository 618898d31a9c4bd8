"""Drives our own engine, in a process of its own as every other."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ellm_jax import Engine, EngineConfig, SamplingParams, __version__
from ellm_jax.checkpoint import read_config, resolve_quantization, weights_bytes

_QUANTISED = ("int8", "int4")


class _Model:
    def __init__(self, settings: dict[str, Any]):
        precision = settings["precision"]
        options: dict[str, Any] = {
            "device": "cpu",
            "dtype": "bfloat16" if precision in _QUANTISED else precision,
            "max_model_len": settings["max_model_len"],
            "max_num_seqs": settings["max_requests"],
            "prefix_caching": False,
            "progress": False,
        }
        if precision in _QUANTISED:
            options["quantization"] = precision
        if settings["kv_limited"]:
            # All that steps take beside weights has to fit there too.
            model = read_config(settings["model"])
            held = resolve_quantization(settings["model"], model, options.get("quantization"))
            weights = weights_bytes(model, options["dtype"], quantization=held)
            options["device_memory"] = settings["kv_bytes"] + weights
        self._engine = Engine.from_pretrained(settings["model"], EngineConfig(**options))
        computes = self._engine.dtype
        self.precision = f"{precision} ({computes})" if precision in _QUANTISED else computes
        self.versions = {"ellm_jax": __version__}
        for package in ("jax", "jaxlib"):
            try:
                self.versions[package] = version(package)
            except PackageNotFoundError:
                continue

    def warm_up(self) -> None:
        self._engine.warm_up()

    def generate(self, prompts: list[list[int]], output_tokens: list[int], recorder: Any) -> None:
        futures = [
            self._engine.submit(
                prompt, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            )
            for prompt, count in zip(prompts, output_tokens, strict=True)
        ]
        for index, future in enumerate(futures):
            output = future.result()
            times = output.metrics
            error = output.outputs[0].error
            if error is not None or times.first_token_s is None or times.finished_s is None:
                raise RuntimeError(f"request {index}: {error or 'it gave no token'}")
            recorder.answer(index, output.token_ids, times.first_token_s, times.finished_s)


def load(settings: dict[str, Any]) -> _Model:
    """Opens an engine on the checkpoint."""
    return _Model(settings)
