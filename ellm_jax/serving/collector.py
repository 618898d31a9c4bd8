"""Keeps Python's garbage collector from looking through the whole program while it serves."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """What is there at the start is not looked through as long as the with-block lasts.

    JAX and a loaded engine are some hundred thousand objects, which stay; a full collection among
    them stops every thread for half a second, and a crowd of requests makes it come.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
