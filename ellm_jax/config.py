"""How an engine is set up: one frozen dataclass for Python, command line and server alike."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024 ** (i + 1) for i, unit in enumerate("KMGT")}

DTYPES = ("float32", "bfloat16")
"""What an engine computes in."""

DEVICES = ("auto", "cpu", "cuda")
"""What an engine runs on."""

LOAD_FORMATS = ("auto", "dummy")
"""Where weights come from."""

QUANTIZATIONS = ("int8", "int4", "int4-g128")
"""How weights may be held in less than the dtype of the computation."""

KV_DTYPES = ("auto", "int8")
"""In what K and V are held."""

_MAX_BYTES = 2**60
POLICY_NAMES = ("elastic", "intra", "inter", "static-chunked", "static")
"""How memory is divided; see `ellm_jax.scheduler.policy`."""

_MAX_COUNTS = {
    "tensor_parallel": 64,
    "threads": 1024,
    "max_model_len": 2**31 - 1,
    "max_num_seqs": 4096,
    "max_batch_tokens": 65536,
}
_MAX_IDLE_S = 1e9  # what threads can wait for has a limit, not far above


def parse_bytes(size: int | str) -> int:
    """Reads a size: an int of bytes, or text such as "512MiB", "2GB", "1.5GiB".

    Raises:
        ValueError: text that is no size, or a size below 0 or above 1 EiB.
        TypeError: neither an int nor text.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        count = size
    elif not isinstance(size, str):
        raise TypeError(
            f"{size!r} is no size; give bytes as an int, or text such as 512MiB, 2GB, 1.5GiB"
        )
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?)B?\s*", size.upper())
        if match is None or match[2] == "I":
            raise ValueError(
                f"{size!r} is no size; write bytes, or for example 512MiB, 2GB, 1.5GiB"
            )
        count = int(Fraction(match[1]) * _UNITS[match[2]])
    if count < 0:
        raise ValueError(f"{size!r} is below 0; a size counts bytes")
    if count > _MAX_BYTES:
        raise ValueError(f"{size!r} is above 1 EiB, which no machine has; write for example 2GiB")
    return count


def format_bytes(count: int) -> str:
    """Writes bytes for people: "1.50 GiB"."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.2f} {unit}"


@dataclass(frozen=True)
class EngineConfig:
    """Limits and choices of an engine. Hashable; checked when made.

    Attributes:
        device: "cuda": NVIDIA GPUs; "cpu"; "auto": GPUs where there are any that JAX and this build
            can use, else the CPU.
        tensor_parallel: devices that share the model, each with its part of the weights and its
            heads of the KV cache. `device_memory` and `host_memory` are then for each of them, and
            so are the figures of `Engine.memory`.
        threads: of the CPU: XLA and the kernels share one pool. None: one for each core that the
            process may use, by its affinity and its quota. Fixed once JAX has used the CPU: a later
            engine has to ask for the same, or for none.
        device_memory: most bytes that weights, KV cache and activations take together, as bytes or
            text ("2GiB"). None: what is free when the engine starts, less a tenth.
        load_format: "auto": weights from the checkpoint, in whichever format it has them; "dummy":
            random ones, made on the device from config.json alone, for measuring speed and memory.
        dtype: "float32" or "bfloat16"; None: the checkpoint's own, float16 becoming bfloat16.
        quantization: "int8": the matrices of linear layers and of the output head are quantised
            when they are loaded, each output with a scale of its own, and what they multiply is
            quantised row by row as it comes; embeddings and norms stay in `dtype`. About half the
            bytes of bfloat16. "int4": four bits, each 32 inputs of an output with a scale of
            their own, "int4-g128" each 128; the output head is int8. About a quarter of the bytes.
            On the CPU only. None: weights as the checkpoint has them, which may be quantised
            already (GPTQ, AWQ, compressed-tensors in 4 or 8 bits).
        kv_dtype: "int8": K and V are held in int8, each row of a head with a scale of its own, so
            that the same memory holds about twice the tokens of bfloat16, and attention to long
            contexts reads half as much. On the CPU only. "auto": in `dtype`.
        max_model_len: most tokens of prompt and output together; None: the model's context.
        max_num_seqs: most requests that run at once; at most 4096.
        max_batch_tokens: most tokens of a step, at most 65536; longer prompts are prefilled in
            chunks. None: the policy's own, 2048 for "elastic".
        host_memory: bytes of host memory, beside `device_memory`, that KV of requests may be moved
            to when the device is short, as bytes or text. 0: none.
        policy: how memory is divided: "elastic" (it moves between activations, KV cache and host
            memory), or what that is compared with: "intra" (within the device only), "inter"
            (between device and host only), "static-chunked" and "static" (activations are reserved
            for a step of 512 tokens, or for the longest prompt).
        ttft_ms: target for the time to the first token, in milliseconds, of requests that bring
            none of their own. None: no target.
        tpot_ms: the same for the mean time per token after the first. None: no target.
        prefix_caching: keep the KV of prompts and answers, as long as nobody needs the memory, for
            requests that begin the same way.
        warm_up: compile the common step shapes at start rather than when first needed.
        idle_trim_s: seconds without work after which memory that nobody uses goes back to the
            system; the next request pays for mapping it again. None means never.
        compilation_cache: directory that keeps compiled steps between runs; None: a folder in the
            user's cache directory; "": none.
        progress: show progress bars while loading and compiling.
    """

    device: str = "auto"
    tensor_parallel: int = 1
    threads: int | None = None
    device_memory: int | str | None = None
    load_format: str = "auto"
    dtype: str | None = None
    quantization: str | None = None
    kv_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_batch_tokens: int | None = None
    host_memory: int | str = 0
    policy: str = "elastic"
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    prefix_caching: bool = True
    warm_up: bool = True
    idle_trim_s: float | None = 1.0
    compilation_cache: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.device_memory is not None and parse_bytes(self.device_memory) < 1:
            raise ValueError(
                f"device_memory={self.device_memory!r}: must be at least 1 byte; "
                "leave it out for what is free at start"
            )
        _check_choice("device", self.device, DEVICES)
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"dtype={self.dtype!r}: the engine computes in {' or '.join(DTYPES)}; "
                "leave it out to follow the checkpoint"
            )
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization={self.quantization!r}: there is {', '.join(QUANTIZATIONS)}; "
                "leave it out for weights in dtype"
            )
        _check_choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        for name, most in _MAX_COUNTS.items():
            _check_count(name, getattr(self, name), most)
        parse_bytes(self.host_memory)
        _check_choice("policy", self.policy, POLICY_NAMES)
        for name in ("ttft_ms", "tpot_ms"):
            check_target(name, getattr(self, name))
        for name in ("warm_up", "progress", "prefix_caching"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be True or False")
        if self.compilation_cache is not None and not isinstance(self.compilation_cache, str):
            raise TypeError(
                f"compilation_cache={self.compilation_cache!r}: must be text; "
                "give the directory as str"
            )
        _check_idle(self.idle_trim_s)

    @property
    def device_memory_bytes(self) -> int | None:
        """The limit in bytes, or None for what is free at start."""
        return None if self.device_memory is None else parse_bytes(self.device_memory)

    @property
    def host_memory_bytes(self) -> int:
        """The host tier's limit in bytes."""
        return parse_bytes(self.host_memory)


def check_target(name: str, value: object) -> None:
    """Raises ValueError or TypeError unless `value` is a latency in milliseconds, or None."""
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be a number of milliseconds, or None")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r}: must be above 0 milliseconds; use None for no target")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name}={value!r}: there are {', '.join(choices)}; leave it out for {choices[0]}"
        )


def _check_count(name: str, value: object, most: int) -> None:
    if value is None and name in ("threads", "max_model_len", "max_batch_tokens"):
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be a whole number from 1 to {most}")
    if value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
    if value > most:
        raise ValueError(f"{name}={value!r}: must be a whole number of at most {most}")


def _check_idle(seconds: object) -> None:
    if seconds is None:
        return
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise TypeError(f"idle_trim_s={seconds!r}: must be a number of seconds, or None for never")
    # So written, NaN is refused too.
    if not 0 <= seconds <= _MAX_IDLE_S:
        raise ValueError(
            f"idle_trim_s={seconds!r}: must be from 0 to {_MAX_IDLE_S:g} seconds; "
            "use None for never"
        )
