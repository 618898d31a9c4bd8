"""Exports a Hugging Face directory for OpenVINO, with optimum-intel's own command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_WEIGHTS = {
    "bfloat16": ("fp16",),
    "float16": ("fp16",),
    "float32": ("fp32",),
    "int8": ("int8",),
    "int4": ("int4", "--group-size", "128", "--ratio", "1.0", "--sym"),
}
"""Of a precision, how weights are stored. bfloat16 fits float16 but for values below 6e-8."""


def convert(source: str, target: str, precision: str) -> None:
    """Writes the model and its tokenizer to `target`.

    Raises:
        SystemExit: the export failed; it says why on stderr.
    """
    code = subprocess.call(
        [
            str(Path(sys.executable).with_name("optimum-cli")),
            *("export", "openvino", "--model", source, "--task", "text-generation-with-past"),
            *("--weight-format", *_WEIGHTS[precision]),
            target,
        ]
    )
    if code:
        sys.exit(code)
