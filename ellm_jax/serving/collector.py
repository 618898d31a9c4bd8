"""Keeps Python's garbage collector from looking through the whole program while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator

from ellm_jax.engine import Engine

_FULL_EVERY = 100
"""Collections of the middle generation between two of everything; Python's own default is 10."""
_LOOK_S = 0.25


@contextlib.asynccontextmanager
async def settled(engine: Engine) -> AsyncIterator[None]:
    """What is there at the start, and what compiling a step leaves behind, is not looked through as
    long as the with-block lasts; and full collections are rare.

    JAX and a loaded engine are some hundred thousand objects, which stay, and each compiled step
    adds to them; a full collection among them stops every thread for up to half a second, and a
    crowd of requests makes it come.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(before[0], before[1], _FULL_EVERY)
    looking = asyncio.create_task(_freeze_what_is_compiled(engine))
    try:
        yield
    finally:
        looking.cancel()
        gc.set_threshold(*before)
        gc.unfreeze()


async def _freeze_what_is_compiled(engine: Engine) -> None:
    known = engine.stats().compiled_steps
    while True:
        await asyncio.sleep(_LOOK_S)
        compiled = engine.stats().compiled_steps
        if compiled != known:
            known = compiled
            gc.freeze()
