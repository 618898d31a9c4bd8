"""Loading and converting checkpoints: exact values, clear errors, bounded memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_checkpoints as hf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from ellm_jax.checkpoint import (
    CheckpointError,
    aligned,
    convert,
    load_model,
    read_config,
    resolve_dtype,
    weights_bytes,
)
from ellm_jax.checkpoint.aligned import ALIGNMENT_BYTES, aligned_empty
from ellm_jax.checkpoint.directory import ORBAX_FOLDER, weight_files
from ellm_jax.checkpoint.hf_weights import PIECE_BYTES, read_hf_params
from ellm_jax.checkpoint.orbax_weights import read_orbax_params
from ellm_jax.models import ModelConfigError, checkpoint_tensors, config_from_hf, param_shapes
from ellm_jax.models.decoder import Decoder
from ellm_jax.models.shards import Shards
from ellm_jax.models.xla_ops import XlaOps

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about host memory")


def weights_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and the weights of a case, to be damaged."""
    config = hf.config_dict(hf.CASES[name])
    return config, hf.make_weights(config, hf.CASES[name].seed)


def logits_of(model: Decoder) -> Any:
    def run(model: Decoder, tokens: jax.Array) -> jax.Array:
        hidden, _ = model(tokens, jnp.arange(tokens.size), XlaOps(), None)
        return model.logits(hidden, XlaOps())

    return np.asarray(nnx.jit(run)(model, jnp.arange(3, 40)))


def assert_holds_the_checkpoint(model: Decoder, path: Path, dtype: str) -> None:
    """Every checkpoint tensor lies where its placement says, and nothing else lies there."""
    config = read_config(path)
    params = {name: np.asarray(array) for name, array in model.named_params().items()}
    name, weights = path.name, weights_of(path.name)[1]
    covered = dict.fromkeys(params, 0)
    for placement in checkpoint_tensors(config):
        param = params[placement.param]
        block = param if placement.layer is None else param[placement.layer]
        stored = weights[placement.name].astype(hf.DTYPES[config.dtype])
        np.testing.assert_array_equal(
            block[placement.row : placement.row + placement.shape[0]],
            stored.astype(hf.DTYPES[dtype]),
            err_msg=f"{name}: {placement.name}",
        )
        covered[placement.param] += math.prod(placement.shape)
    assert covered == {key: param.size for key, param in params.items()}


@pytest.mark.parametrize("name", ["llama_bias_linear", "qwen2_tied", "qwen3_head128"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_lands_in_its_place(name: str, shards: int, tmp_path: Path) -> None:
    path = hf.make_checkpoint(tmp_path, name, shards=shards)
    model, config = load_model(path)
    assert config == read_config(path)
    assert_holds_the_checkpoint(model, path, "float32")


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", None])
def test_dtypes_convert_as_numpy_does(stored: str, asked: str | None, tmp_path: Path) -> None:
    path = hf.make_checkpoint(tmp_path, "qwen3_head128", dtype=stored)
    model, config = load_model(path, dtype=asked)
    expected = asked or ("bfloat16" if stored == "float16" else stored)
    assert resolve_dtype(config, asked) == expected
    assert {str(array.dtype) for array in model.named_params().values()} == {expected}
    assert_holds_the_checkpoint(model, path, expected)
    held = sum(array.nbytes for array in model.named_params().values())
    assert held == weights_bytes(config, asked) == weights_bytes(path, asked)


def test_conversion_crosses_pieces(tmp_path: Path) -> None:
    config, weights = weights_of("llama")
    config |= {"vocab_size": 3 * PIECE_BYTES // (4 * config["hidden_size"]) + 1}
    embed = np.random.default_rng(0).standard_normal(
        (config["vocab_size"], config["hidden_size"]), np.float32
    )
    weights |= {"model.embed_tokens.weight": embed, "lm_head.weight": -embed}
    path = hf.write_checkpoint(tmp_path / "wide", config, weights)
    params = load_model(path, dtype="bfloat16")[0].named_params()
    np.testing.assert_array_equal(params["embed"], embed.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(params["lm_head"], -embed.astype(ml_dtypes.bfloat16))


def test_a_dtype_that_is_not_computed_in_is_refused(tmp_path: Path) -> None:
    path = hf.make_checkpoint(tmp_path, "llama")
    with pytest.raises(CheckpointError, match=r"dtype='float16'.*float32, bfloat16"):
        load_model(path, dtype="float16")


def test_the_file_tells_the_dtype_where_the_config_does_not(tmp_path: Path) -> None:
    path = hf.make_checkpoint(tmp_path, "llama", dtype="bfloat16", shards=2)
    raw = json.loads((path / "config.json").read_text())
    del raw["dtype"]
    (path / "config.json").write_text(json.dumps(raw))
    assert read_config(path).dtype == "bfloat16"


@on_cpu
def test_jax_takes_the_memory_without_a_copy() -> None:
    for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        host = aligned_empty((3, 1001, 7), dtype)
        host[...] = 1
        assert host.ctypes.data % ALIGNMENT_BYTES == 0
        assert jax.device_put(host).unsafe_buffer_pointer() == host.ctypes.data


def test_progress_counts_every_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = hf.make_checkpoint(tmp_path, "qwen2_tied")
    seen: list[tuple[int, int]] = []
    load_model(path, dtype="bfloat16", progress=lambda done, total: seen.append((done, total)))
    total_bytes = weights_bytes(path, "bfloat16")
    done_bytes = [done for done, _ in seen]
    assert done_bytes == sorted(done_bytes)
    assert seen[-1] == (total_bytes, total_bytes)
    load_model(path, progress=False)
    assert capsys.readouterr() == ("", "")
    load_model(path, progress=True)
    assert "Loading weights: 100%" in capsys.readouterr().err


def test_tensors_that_follow_from_the_config_are_ignored(tmp_path: Path) -> None:
    config, weights = weights_of("qwen2_tied")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(32, np.float32)
    load_model(hf.write_checkpoint(tmp_path / "qwen2_tied", config, weights))


def test_turn_ends_of_the_generation_config_are_added(tmp_path: Path) -> None:
    path = hf.make_checkpoint(tmp_path, "llama")
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 2, 9]}')
    assert read_config(path).eos_token_ids == (2, 7, 9)
    (path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_config(path).eos_token_ids == (2,)
    (path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ModelConfigError, match=r"generation_config\.json"):
        read_config(path)


def drop(weights: dict[str, Any]) -> None:
    for layer in range(3):
        del weights[f"model.layers.{layer}.mlp.up_proj.weight"]
        del weights[f"model.layers.{layer}.mlp.down_proj.weight"]


def add(weights: dict[str, Any]) -> None:
    weights["model.layers.3.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)


def reshape(weights: dict[str, Any]) -> None:
    weights["model.norm.weight"] = np.ones(255, np.float32)


def retype(weights: dict[str, Any]) -> None:
    weights["model.norm.weight"] = np.ones(256, np.int64)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop, ["6 tensors are missing", "model.layers.0.mlp.down_proj.weight", "and 2 more"]),
        (add, ["1 tensors are left over: model.layers.3.mlp.up_proj.weight", "llama"]),
        (reshape, ["model.norm.weight", "[255]", "[256]"]),
        (retype, ["model.norm.weight", "I64", "F32, F16, BF16"]),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_tensors_that_do_not_fit(
    damage: Callable[[dict[str, Any]], None], words: list[str], shards: int, tmp_path: Path
) -> None:
    config, weights = weights_of("llama")
    damage(weights)
    path = hf.write_checkpoint(tmp_path / "llama", config, weights, shards)
    with pytest.raises(CheckpointError) as refusal:
        load_model(path)
    for word in words:
        assert word in str(refusal.value)


def no_directory(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def broken_config(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": ')


def listed_config(path: Path) -> None:
    (path / "config.json").write_text("[]")


def unknown_model(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "bert"}')


def no_weights(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    (path / "pytorch_model.bin").touch()


def missing_shard(path: Path) -> None:
    (path / "model-00002-of-00002.safetensors").unlink()


def empty_index(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text("{}")


def index_elsewhere(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')


def repeated_tensor(path: Path) -> None:
    first, second = sorted(path.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())


def truncated_data(path: Path) -> None:
    file = path / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def truncated_header(path: Path) -> None:
    file = path / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def empty_file(path: Path) -> None:
    (path / "model-00001-of-00002.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_directory, ["does not exist", "nothing is downloaded"]),
        (no_config, ["has no config.json", "model-00001-of-00002.safetensors"]),
        (broken_config, ["config.json cannot be read as JSON"]),
        (listed_config, ["config.json holds a list"]),
        (unknown_model, ["model_type='bert'", "llama"]),
        (no_weights, ["neither model.safetensors nor", "pytorch_model.bin", "can run code"]),
        (missing_shard, ["names 2 files, of which 1 are missing", "model-00002-of-00002"]),
        (empty_index, ["has no weight_map"]),
        (index_elsewhere, ["outside its directory", "../x.safetensors"]),
        (repeated_tensor, ["repeats tensors"]),
        (truncated_data, ["is not a whole safetensors file", "truncated", "again"]),
        (truncated_header, ["(100 bytes) is not a whole safetensors file"]),
        (empty_file, ["(0 bytes) is not a whole safetensors file"]),
    ],
)
def test_damaged_directories(
    damage: Callable[[Path], None], words: list[str], tmp_path: Path
) -> None:
    path = hf.make_checkpoint(tmp_path, "llama", shards=2)
    damage(path)
    with pytest.raises((CheckpointError, ModelConfigError)) as refusal:
        load_model(path)
    for word in words:
        assert word in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    path = hf.make_checkpoint(tmp_path, "llama") / "model.safetensors"
    with pytest.raises(CheckpointError, match="is a file"):
        load_model(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama_bias_linear", "qwen2_tied", "qwen3_yarn_bias"])
def test_converted_models_are_bit_equal(name: str, dtype: str, tmp_path: Path) -> None:
    path = hf.make_checkpoint(tmp_path, name, shards=2)
    before, _ = load_model(path, dtype=dtype)
    target = convert(path, tmp_path / "converted", dtype, progress=False)
    after, config = load_model(target)
    assert config.dtype == dtype
    for key, array in before.named_params().items():
        again = after.named_params()[key]
        assert again.dtype == array.dtype
        assert np.asarray(again).tobytes() == np.asarray(array).tobytes(), key
    assert logits_of(after).tobytes() == logits_of(before).tobytes()


def test_converted_models_load_in_another_dtype(tmp_path: Path) -> None:
    path = hf.make_checkpoint(tmp_path, "qwen3_head128")
    target = convert(path, tmp_path / "converted", progress=False)
    expected = load_model(path, dtype="bfloat16")[0].named_params()
    seen: list[tuple[int, int]] = []
    model, _ = load_model(
        target, dtype="bfloat16", progress=lambda done, total: seen.append((done, total))
    )
    for key, array in model.named_params().items():
        assert np.asarray(array).tobytes() == np.asarray(expected[key]).tobytes(), key
    assert seen[-1] == (weights_bytes(path, "bfloat16"),) * 2


def test_converting_carries_the_small_files_and_no_weights(tmp_path: Path) -> None:
    path = hf.make_checkpoint(tmp_path, "llama31_tied", dtype="float16")
    small = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "chat_template.jinja": "{{ x }}",
        "generation_config.json": '{"eos_token_id": 5}',
    }
    for name, text in small.items():
        (path / name).write_text(text)
    (path / "pytorch_model.bin").write_text("weights")
    target = convert(path, tmp_path / "converted", progress=False)
    assert {entry.name for entry in target.iterdir()} == {*small, "config.json", ORBAX_FOLDER}
    assert all((target / name).read_text() == text for name, text in small.items())
    before, after = read_config(path), read_config(target)
    assert (before.dtype, after.dtype) == ("float16", "bfloat16")
    assert after.eos_token_ids == before.eos_token_ids == (2, 5)
    # Every pickle of a protocol since 2 starts with 0x80 and its number, and ends with a dot.
    for file in (entry for entry in target.rglob("*") if entry.is_file()):
        content = file.read_bytes()
        assert not (content[:1] == b"\x80" and content[-1:] == b"."), file


def test_converting_never_overwrites(tmp_path: Path) -> None:
    path = hf.make_checkpoint(tmp_path, "llama")
    before = {file: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError, match="not an empty directory; nothing was written"):
        convert(path, path, progress=False)
    assert {file: file.read_bytes() for file in path.iterdir()} == before


def forget_an_array(root: Path) -> None:
    metadata = json.loads((root / "_METADATA").read_text())
    metadata["tree_metadata"].pop("('embed',)")
    (root / "_METADATA").write_text(json.dumps(metadata))


def lose_the_metadata(root: Path) -> None:
    (root / "_METADATA").unlink()


def lose_the_data(root: Path) -> None:
    for file in root.rglob("d/*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def another_shape(root: Path) -> None:
    config = json.loads((root.parent / "config.json").read_text())
    (root.parent / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (forget_an_array, ["missing embed", "left over none"]),
        (lose_the_metadata, ["is not a whole Orbax checkpoint"]),
        (lose_the_data, ["cannot be read"]),
        (another_shape, ["embed", "[512, 256]", "[500, 256]"]),
    ],
)
def test_damaged_orbax(damage: Callable[[Path], None], words: list[str], tmp_path: Path) -> None:
    path = hf.make_checkpoint(tmp_path, "llama")
    target = convert(path, tmp_path / "converted", progress=False)
    damage(target / ORBAX_FOLDER)
    with pytest.raises(CheckpointError) as refusal:
        load_model(target)
    for word in [*words, "Convert the model again"]:
        assert word in str(refusal.value)


PEAK = """
import sys
import jax.numpy as jnp
from ellm_jax.checkpoint import load_model, weights_bytes

def peak_bytes():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) * 1024 for l in status if l.startswith("VmHWM"))

path, dtype = sys.argv[1], sys.argv[2]
quantization = sys.argv[3] or None
(jnp.zeros(8) + 1).block_until_ready()
before = peak_bytes()
model = load_model(path, dtype=dtype, quantization=quantization)
print((peak_bytes() - before) / weights_bytes(path, dtype, quantization=quantization))
"""


@on_cpu
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_is_the_weights_and_a_tenth(tmp_path: Path) -> None:
    config = hf.config_dict(hf.CASES["llama"], "bfloat16")
    config |= {"vocab_size": 24576, "hidden_size": 1024, "intermediate_size": 4096}
    config |= {"num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8}
    noise = np.random.default_rng(0)
    weights = {
        # Any bits but those of infinities and NaNs.
        name: (noise.integers(0, 1 << 16, shape, np.uint16) & 0xBFFF).view(ml_dtypes.bfloat16)
        for name, shape in hf.weight_shapes(config)
    }
    path = hf.write_checkpoint(tmp_path / "large", config, weights, shards=2)
    assert weights_bytes(path) > 280e6
    converted = convert(path, tmp_path / "converted", progress=False)
    whole = [(path, "bfloat16", ""), (path, "float32", ""), (converted, "bfloat16", "")]
    # Quantised, a layer's largest matrix is held beside what it becomes; a tenth is of all that is
    # read.
    held = weights_bytes(path, quantization="int8")
    quantised_most = (held + 2 * 4096 * 1024 * 2 + 0.1 * weights_bytes(path)) / held
    quantised = [(folder, "bfloat16", "int8") for folder in (path, converted)]
    for folder, dtype, quantization in whole + quantised:
        done = subprocess.run(
            [sys.executable, "-P", "-c", PEAK, str(folder), dtype, quantization],
            capture_output=True,
            text=True,
            check=True,
        )
        peak = float(done.stdout)
        said = f"{folder.name} as {dtype} {quantization}: {peak:.3f} of the weights"
        print(f"peak resident memory: {said}")
        assert peak <= (quantised_most if quantization else 1.1), said


@pytest.mark.parametrize("orbax", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_blocks_put_together_are_the_parts(
    orbax: bool,
    count: int,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tiny_checkpoint("llama_bias_linear")
    config = read_config(path)
    monkeypatch.setattr(aligned, "_BLOCK_ELEMENTS", 7 * config.hidden_size + 1)

    def read(in_blocks: set[str]) -> dict[str, list[Any]]:
        read_bytes: list[int] = []
        rest = (config, np.dtype(np.float32), read_bytes.append, Shards(count), in_blocks)
        folder = tmp_path / "converted"
        found: dict[str, list[Any]] = {}
        for name, array in (
            read_orbax_params(folder, *rest) if orbax else read_hf_params(weight_files(path), *rest)
        ):
            found.setdefault(name, []).append(array)
        assert sum(read_bytes) == sum(array.nbytes for each in found.values() for array in each)
        return found

    if orbax:
        convert(path, tmp_path / "converted", progress=False)
    whole, blocks = read(set()), read({"lm_head", "blocks.o"})
    assert len(blocks["lm_head"]) > 2 * count
    assert len(blocks["blocks.o"]) == config.num_layers * count
    for name, arrays in whole.items():
        np.testing.assert_array_equal(np.concatenate(blocks[name]), np.concatenate(arrays), name)


def test_shapes_count_every_checkpoint_element() -> None:
    for name in hf.CASES:
        raw = hf.config_dict(hf.CASES[name])
        ours = sum(math.prod(shape) for shape in param_shapes(config_from_hf(raw)).values())
        assert ours == sum(math.prod(shape) for _, shape in hf.weight_shapes(raw)), name
