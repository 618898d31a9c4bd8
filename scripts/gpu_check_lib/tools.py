"""Finds the programs of CUDA's toolkit, whose folder is not always on the PATH."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_USUAL = Path("/usr/local/cuda/bin")


def cuda_tool(name: str) -> str | None:
    """The path of a program such as "nvcc": beside the compiler that CUDACXX names, on the PATH, or
    where the toolkit is usually installed; None where it is in none of them."""
    compiler = os.environ.get("CUDACXX")
    places = [] if not compiler else [str(Path(shutil.which(compiler) or compiler).parent)]
    for place in (*places, None, str(_USUAL)):
        found = shutil.which(name, path=place)
        if found is not None:
            return found
    return None
