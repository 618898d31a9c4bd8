"""A model divided among devices: which part each of them reads, and that two devices answer as one.

The engines are in two_devices.py, which needs a JAX with two devices.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import hf_checkpoints
import numpy as np
import pytest

from ellm_jax.checkpoint import convert, read_config, weights_bytes
from ellm_jax.checkpoint.directory import weight_files
from ellm_jax.checkpoint.hf_weights import read_hf_params
from ellm_jax.checkpoint.orbax_weights import read_orbax_params
from ellm_jax.checkpoint.safetensors_file import SafetensorsFile
from ellm_jax.models import param_shapes
from ellm_jax.models.shards import Shards


def parts_of(path, config, shards, read):
    """Parameters by name: the parts of all devices, in their order."""
    parts = {name: [] for name in param_shapes(config)}
    for name, array in read(path, config, np.dtype(np.float32), lambda _: None, shards):
        parts[name].append(array.copy())
    return parts


def read_hf(path, *args):
    return read_hf_params(weight_files(path), *args)


def expected_part(name, whole, config, count, index, exact):
    """By hand: heads for q, k and v, rows of gate and of up, and so on."""

    def share(array, axis):
        return np.array_split(array, count, axis)[index]

    kind = name.removeprefix("blocks.").removesuffix("_bias")
    if kind == "qkv":
        cuts = [config.q_size, config.q_size + config.kv_size]
        return np.concatenate([share(x, 1) for x in np.split(whole, cuts, axis=1)], axis=1)
    if kind == "gate_up":
        return np.concatenate([share(x, 1) for x in np.split(whole, 2, axis=1)], axis=1)
    if name in ("blocks.o", "blocks.down"):
        return share(whole, 1 if exact else 2)
    if name in ("embed", "lm_head"):
        size = -(-len(whole) // count)
        padded = np.zeros((size * count, whole.shape[1]), whole.dtype)
        padded[: len(whole)] = whole
        return padded[index * size : (index + 1) * size]
    return whole


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("orbax", [False, True])
@pytest.mark.parametrize("vocab", [512, 509])
def test_each_device_reads_its_part(exact, orbax, vocab, tmp_path):
    """Four devices, every kind of parameter, a checkpoint in several files, another dtype."""
    case = hf_checkpoints.CASES["llama_bias_linear"]
    raw = {**hf_checkpoints.config_dict(case, "bfloat16"), "vocab_size": vocab}
    weights = {
        name: array.astype(hf_checkpoints.DTYPES["bfloat16"])
        for name, array in hf_checkpoints.make_weights(raw, seed=5).items()
    }
    path = hf_checkpoints.write_checkpoint(tmp_path / "model", raw, weights, shards=3)
    config, read = read_config(path), read_hf
    if orbax:
        path, read = convert(path, tmp_path / "orbax", progress=False), read_orbax_params
    count = 4
    shards = Shards(count, exact)
    shards.check(config)
    whole = {name: part for name, (part,) in parts_of(path, config, Shards(), read).items()}
    told = []
    divided = parts_of(path, config, shards, lambda *args: read(*args[:3], told.append, args[4]))
    for name, parts in divided.items():
        assert len(parts) == count
        for index, part in enumerate(parts):
            expected = expected_part(name, whole[name], config, count, index, exact)
            np.testing.assert_array_equal(part, expected, err_msg=f"{name} of device {index}")
            assert part.shape == shards.part_shape(name, whole[name].shape)
    each = weights_bytes(config, "float32", shards)
    assert each == sum(parts[0].nbytes for parts in divided.values())
    assert sum(told) == count * each


@pytest.mark.parametrize("exact", [True, False])
def test_no_byte_is_read_twice(exact, tiny_checkpoint, monkeypatch):
    path = tiny_checkpoint("llama")
    config = read_config(path)
    read = SafetensorsFile.read_elements
    elements = []

    def counted(self, tensor, first, target):
        elements.append(target.size)
        read(self, tensor, first, target)

    monkeypatch.setattr(SafetensorsFile, "read_elements", counted)
    parts_of(path, config, Shards(2, exact), read_hf)
    norms = (2 * config.num_layers + 1) * config.hidden_size
    stored = weights_bytes(config, "float32") // 4
    assert sum(elements) == stored + norms, "only norms are needed by both devices"


def test_what_does_not_divide_is_refused(tiny_checkpoint):
    config = dataclasses.replace(
        read_config(tiny_checkpoint("llama")), num_heads=12, num_kv_heads=6, intermediate_size=224
    )
    Shards(2).check(config)
    with pytest.raises(ValueError, match="tensor_parallel=3: the model has an intermediate size"):
        Shards(3, exact=False).check(config)
    with pytest.raises(ValueError, match=r"6 key-value heads, which 4 devices.*choose 1 or 2$"):
        Shards(4).check(config)
    with pytest.raises(ValueError, match="6 key-value heads and an intermediate size of 224 and a"):
        Shards(5).check(config)
    odd = dataclasses.replace(config, hidden_size=255)
    Shards(2, exact=False).check(odd)
    with pytest.raises(ValueError, match="a hidden size of 255, which 2 devices"):
        Shards(2).check(odd)


def test_one_device_divides_nothing(tiny_checkpoint):
    config = read_config(tiny_checkpoint("llama_bias_linear"))
    for name, shape in param_shapes(config).items():
        assert Shards().axis(name) is None
        assert Shards().part_shape(name, shape) == Shards().joint_shape(name, shape) == shape


@pytest.mark.timeout(1800)
def test_engines_on_two_devices(pytestconfig):
    """two_devices.py in a process in which JAX makes two devices of the CPU."""
    file = Path(__file__).with_name("two_devices.py")
    flags = os.environ.get("XLA_FLAGS", "")
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "--no-header", str(file)],
        cwd=pytestconfig.rootpath,
        env={**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
