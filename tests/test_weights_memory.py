"""Weights are held once: one part of them on the host at a time, and none of a closed engine."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ellm_jax import Engine, EngineConfig, assembly
from ellm_jax.checkpoint import convert, hf_weights, load, load_model, orbax_weights


class Parts:
    """The arrays that parameters are read into, and how many of them there are at once."""

    def __init__(self, monkeypatch, module):
        self.made: list[weakref.ref] = []
        self.most = 0
        make = module.aligned_empty

        def aligned_empty(shape, dtype):
            self.most = max(self.most, sum(part() is not None for part in self.made))
            array = make(shape, dtype)
            self.made.append(weakref.ref(array))
            return array

        monkeypatch.setattr(module, "aligned_empty", aligned_empty)


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_a_part_is_gone_before_the_next_one_is_read(kind, tiny_checkpoint, tmp_path, monkeypatch):
    path, module = tiny_checkpoint("llama"), hf_weights
    if kind == "orbax":
        path, module = convert(path, tmp_path / "orbax", progress=False), orbax_weights
    parts = Parts(monkeypatch, module)
    # As on a device with memory of its own.
    monkeypatch.setattr(load.jax, "device_put", lambda array, place: jnp.array(array, copy=True))
    load_model(path)
    assert len(parts.made) > 5
    assert parts.most == 0


def test_a_closed_engines_weights_are_gone_before_another_engine_looks_for_room(
    tiny_checkpoint, monkeypatch
):
    config = EngineConfig(device_memory="32MiB", warm_up=False, progress=False, max_num_seqs=4)
    path = tiny_checkpoint("llama")
    gc.disable()
    try:
        engine = Engine.from_pretrained(path, config)
        weights = weakref.ref(jax.tree.leaves(engine._loop.executor._runner._weights)[0])
        assert np.asarray(weights()).size
        engine.close()
        del engine
        found = []
        look = assembly.open_devices

        def open_devices(*args):
            found.append(weights() is None)
            return look(*args)

        monkeypatch.setattr(assembly, "open_devices", open_devices)
        Engine.from_pretrained(path, config).close()
        assert found == [True]
    finally:
        gc.enable()
