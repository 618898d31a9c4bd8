"""The figures that no engine can better on a machine, from what was measured of it beside them.

Decoding has to read the weights, and the K and V of what came before, for every step; prefill and
batches have to multiply. Activations, norms and sampling count for nothing here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ellm_jax.bench.peers.scenarios import HIGHER_IS_BETTER, PeerWorkload
from ellm_jax.bench.peers.session import Launch
from ellm_jax.models.config import ModelConfig
from ellm_jax.models.params import param_shapes

_PROGRAM = Path(__file__).parent / "machine.py"
_TIMEOUT_S = 120.0
_WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Machine:
    """What was measured.

    Attributes:
        read_bytes_per_s: of memory, by all threads together.
        matrix_ops_per_s: of the quickest product of two matrices; 0: none was measured.
        matrix_by: the library that did it.
    """

    read_bytes_per_s: float
    matrix_ops_per_s: float
    matrix_by: str


def measure_machine(
    launches: Iterable[Launch], precision: str, timeout_s: float = _TIMEOUT_S
) -> Machine | None:
    """Measures in the environment of each engine; None where no measurement came to an end.

    Quantised models are held against products in bfloat16 nowhere: theirs are not measured.
    """
    read, rates = 0.0, {"": 0.0}
    for launch in launches:
        found = _run(launch, precision, timeout_s)
        read = max(read, found.get("read_bytes_per_s", 0.0))
        if precision in ("float32", "bfloat16", "float16"):
            for name, rate in found.get("matrix_rates", {}).items():
                rates[name] = max(rate, rates.get(name, 0.0))
    best = max(rates, key=lambda name: rates[name])
    return Machine(read, rates[best], best) if read else None


def faster(first: Machine | None, second: Machine | None) -> Machine | None:
    """The best of two measurements of one machine: nothing of a floor may be slower than what the
    machine once gave, and shared ones give more at one time than at another."""
    if first is None or second is None:
        return first or second
    by_rate = max(first, second, key=lambda machine: machine.matrix_ops_per_s)
    read = max(first.read_bytes_per_s, second.read_bytes_per_s)
    return dataclasses.replace(by_rate, read_bytes_per_s=read)


def _run(launch: Launch, precision: str, timeout_s: float) -> dict[str, Any]:
    # An engine's command is its interpreter, a switch, the program with its arguments, the cores.
    interpreter, switch, *_, cores = launch.command
    try:
        ended = subprocess.run(
            [interpreter, switch, str(_PROGRAM), precision, cores],
            env=dict(launch.env),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
        found = json.loads(ended.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class _Costs:
    """What a model's work costs.

    Attributes:
        weight_bytes: of the matrices that every step reads.
        token_bytes: of K and V of a token.
        layer_ops: operations of a token in the matrices of the layers.
        head_ops: of the scores of one token.
        pair_ops: of one query with one key and value, in all layers.
    """

    weight_bytes: float
    token_bytes: float
    layer_ops: float
    head_ops: float
    pair_ops: float

    @classmethod
    def of(cls, config: ModelConfig, precision: str) -> _Costs:
        shapes = param_shapes(config)
        head = config.vocab_size * config.hidden_size
        layers = sum(
            math.prod(shape)
            for name, shape in shapes.items()
            if name.startswith("blocks.") and len(shape) == 3
        )
        # K and V of quantised models stay in bfloat16.
        element_bytes = 4 if precision == "float32" else 2
        return cls(
            weight_bytes=(layers + head) * _WEIGHT_BYTES[precision],
            token_bytes=2.0 * config.num_layers * config.kv_size * element_bytes,
            layer_ops=2.0 * layers,
            head_ops=2.0 * head,
            pair_ops=4.0 * config.num_layers * config.q_size,
        )

    def prefill_ops(self, tokens: int) -> float:
        """Of a prompt, each token with those before it and itself, and the scores of the last."""
        return tokens * self.layer_ops + tokens * (tokens + 1) / 2 * self.pair_ops + self.head_ops

    def decode_bytes(self, prompt: int, output: int) -> float:
        """Read for the tokens after the first, alone."""
        steps = output - 1
        return steps * self.weight_bytes + self.decode_kv_bytes(prompt, output)

    def decode_kv_bytes(self, prompt: int, output: int) -> float:
        """Of these, K and V."""
        steps = output - 1
        return steps * (prompt + (steps + 1) / 2) * self.token_bytes

    def decode_ops(self, prompt: int, output: int) -> float:
        """Of the tokens after the first."""
        steps = output - 1
        seen = prompt + (steps + 1) / 2
        return steps * (self.layer_ops + self.head_ops + seen * self.pair_ops)


def floors(
    machine: Machine, config: ModelConfig, precision: str, workload: PeerWorkload
) -> dict[str, float]:
    """The best possible figures of a workload, by key; those without a measurement are left out.

    A batch can do no better than to multiply all it has to, or to read the weights for each step
    of its longest answer and the K and V of all, whichever takes longer.
    """
    costs = _Costs.of(config, precision)
    read, rate = machine.read_bytes_per_s, machine.matrix_ops_per_s
    prompt, output = workload.prompt_tokens, workload.output_tokens
    found = {"decode_tokens_per_s": (output - 1) * read / costs.decode_bytes(prompt, output)}
    if rate:
        found["ttft_ms"] = 1e3 * costs.prefill_ops(prompt) / rate
    if workload.long_prompt_tokens:
        prompt, output = workload.long_prompt_tokens, workload.long_output_tokens
        bytes_read = costs.decode_bytes(prompt, output)
        found["long_decode_tokens_per_s"] = (output - 1) * read / bytes_read
        if rate:
            found["long_ttft_s"] = costs.prefill_ops(prompt) / rate
    if workload.batch and rate:
        prefill_s = sum(costs.prefill_ops(prompt) for prompt, _ in workload.batch) / rate
        multiply_s = sum(costs.decode_ops(*lengths) for lengths in workload.batch) / rate
        steps = max(output for _, output in workload.batch) - 1
        kv_bytes = sum(costs.decode_kv_bytes(*lengths) for lengths in workload.batch)
        read_s = (steps * costs.weight_bytes + kv_bytes) / read
        tokens = sum(output for _, output in workload.batch)
        found["batch_tokens_per_s"] = tokens / (prefill_s + max(multiply_s, read_s))
    return found


def reached(floor: Mapping[str, float], figures: Mapping[str, float]) -> dict[str, float]:
    """The share of each floor that an engine's figures reach, from 0 to 1."""
    return {
        key: figures[key] / best if key in HIGHER_IS_BETTER else best / figures[key]
        for key, best in floor.items()
        if figures.get(key)
    }
