"""What a server keeps Python's garbage collector from."""

import asyncio
import gc
from types import SimpleNamespace

import pytest

from ellm_jax.serving import collector


def test_what_compiling_leaves_is_not_looked_through(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collector, "_LOOK_S", 0.001)
    engine = SimpleNamespace(stats=lambda: SimpleNamespace(compiled_steps=compiled))
    compiled, before = 3, gc.get_threshold()
    frozen_before = gc.get_freeze_count()

    async def serve() -> None:
        nonlocal compiled
        async with collector.settled(engine):
            assert gc.get_threshold()[2] > before[2]
            first = gc.get_freeze_count()
            assert first > frozen_before
            left = [[each] for each in range(1000)]
            await asyncio.sleep(0.02)
            assert gc.get_freeze_count() <= first
            compiled += 1
            async with asyncio.timeout(30):
                while gc.get_freeze_count() < first + len(left):
                    await asyncio.sleep(0.001)

    asyncio.run(serve())
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
