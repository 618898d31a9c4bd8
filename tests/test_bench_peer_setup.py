"""How engines are installed and checkpoints converted for them."""

import json
import os
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ellm_jax.bench.peers import llama_cpp_convert
from ellm_jax.bench.peers.catalogue import CHILD, PEERS, Peer
from ellm_jax.bench.peers.child import _import_file
from ellm_jax.bench.peers.conversion import converted
from ellm_jax.bench.peers.environments import Installer
from ellm_jax.bench.peers.launching import Launches
from ellm_jax.bench.peers.session import PeerError

FAKE = Path(__file__).parent / "fake_peer.py"

# Stands for an interpreter: makes "environments" with itself in them, and notes what it is asked.
_INTERPRETER = """\
#!/bin/sh
echo "$@" >> {folder}/asked
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit; fi
echo "Collecting things"
if [ -e {folder}/slow ]; then sleep 100; fi
if [ -e {folder}/broken ]; then
    echo "ERROR: Could not find a version that satisfies the requirement" >&2
    echo "ERROR: No matching distribution found for nothing" >&2
    echo "[notice] A new release of pip is available" >&2
    exit 1
fi
"""


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    path = tmp_path / "interpreter"
    path.write_text(_INTERPRETER.format(folder=tmp_path))
    path.chmod(0o755)
    return path


def test_an_environment_is_installed_once(
    tmp_path: Path, interpreter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    asked = tmp_path / "asked"
    peer = Peer("some", ("some>=1", "torch"), FAKE, needs_torch=True)
    installer = Installer(
        tmp_path / "venvs", str(interpreter), "https://torch.example", ("--pre",), timeout_s=20
    )
    home = installer.environment(peer)
    assert home == tmp_path / "venvs" / "some"
    made, pip = asked.read_text().splitlines()
    assert made == f"-m venv {home}"
    assert pip == (
        "-I -m pip install --no-input --disable-pip-version-check "
        "--extra-index-url https://torch.example --pre some>=1 torch"
    )
    assert installer.environment(peer) == home
    assert len(asked.read_text().splitlines()) == 2
    # Other requirements, an installation that was cut off, and who asks for it: anew.
    (home / "left").touch()
    other = Peer("some", ("some>=2",), FAKE)
    installer.environment(other)
    assert not (home / "left").exists()
    assert asked.read_text().splitlines()[-1].endswith("--disable-pip-version-check --pre some>=2")
    (home / "ellm-peer.json").unlink()
    installer.environment(other)
    again = Installer(tmp_path / "venvs", str(interpreter), reinstall=True, timeout_s=20)
    again.environment(other)
    assert len(asked.read_text().splitlines()) == 8
    again.environment(Peer("some", ("some>=2",), FAKE, removed=("more", "most")))
    assert asked.read_text().splitlines()[-1] == "-I -m pip uninstall --yes more most"


def test_what_cannot_be_installed_says_why(tmp_path: Path, interpreter: Path) -> None:
    peer = Peer("some", ("nothing",), FAKE)
    (tmp_path / "broken").touch()
    installer = Installer(tmp_path / "venvs", str(interpreter), timeout_s=1.0)
    with pytest.raises(PeerError) as failed:
        installer.environment(peer)
    log = tmp_path / "venvs" / "some.log"
    assert str(failed.value) == (
        "ERROR: Could not find a version that satisfies the requirement | "
        f"ERROR: No matching distribution found for nothing (all of it in {log})"
    )
    assert "Collecting things" in log.read_text()
    (tmp_path / "broken").unlink()
    (tmp_path / "slow").touch()
    with pytest.raises(PeerError, match="not done in 1 s; raise --install-timeout"):
        installer.environment(peer)
    (tmp_path / "slow").unlink()
    assert installer.environment(peer).is_dir()
    with pytest.raises(PeerError, match="/no/python cannot be started"):
        Installer(tmp_path / "more", "/no/python").environment(peer)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], kinds: dict[str, str]) -> None:
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.tobytes()
        header[name] = {
            "dtype": kinds[name],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_checkpoint_is_converted_once(tmp_path: Path) -> None:
    model, environment = tmp_path / "model", tmp_path / "env"
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 5}')
    (model / "tokenizer.json").write_text("of the model, which is not used")
    weights = model / "model.safetensors"
    weights.write_bytes(b"1234")
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    folder = tmp_path / "converted"

    def convert(precision: str = "bfloat16", converter: Path | None = FAKE) -> Path | None:
        peer = Peer("some", (), FAKE, converter)
        return converted(peer, environment, model, precision, folder, 30)

    assert convert(converter=None) is None
    first = convert()
    assert first is not None
    made = (first / "made").read_text()
    assert convert() == first
    assert (first / "made").read_text() == made
    assert convert("float32") != first
    with pytest.raises(PeerError, match="ValueError: there is no int4"):
        convert("int4")
    broken = tmp_path / "broken.py"
    broken.write_text("def convert(*_):\n    pass\n")
    with pytest.raises(PeerError, match="wrote nothing"):
        convert(converter=broken)
    os.utime(weights, (1, 1))
    assert convert() not in (None, first)
    # Nothing half done is left, nor the copies that converters read.
    assert all(path.suffix in ("", ".log") for path in folder.iterdir())
    assert sum(path.is_dir() for path in folder.iterdir()) == 3


def test_an_engine_sees_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/of/ours/too")
    launches = Launches([2, 5], tmp_path / "caches", {"precision": "int8"})
    environment = tmp_path / "env"
    (environment / "lib").mkdir(parents=True)
    peer = Peer("some", (), FAKE, preload="lib/first.so")
    launch = launches.peer(peer, environment, tmp_path / "made")
    assert launch.command == (
        *(str(environment / "bin" / "python"), "-I", str(CHILD), "serve", str(FAKE), "2,5"),
    )
    assert launch.settings == {"precision": "int8", "converted": str(tmp_path / "made")}
    assert launch.env["OMP_NUM_THREADS"] == "2"
    assert launch.env["XDG_CACHE_HOME"] == str(tmp_path / "caches" / "some")
    assert launch.env["PATH"].startswith(f"{environment / 'bin'}:")
    assert not {"PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "LD_PRELOAD"} & launch.env.keys()
    (environment / "lib" / "first.so").touch()
    first = launches.peer(peer, environment, None).env["LD_PRELOAD"]
    assert first == str(environment / "lib" / "first.so")
    ours = launches.ours()
    assert ours.command[:2] == (sys.executable, "-P")
    assert ours.env["PYTHONPATH"] == "/of/ours"
    assert "JAX_COMPILATION_CACHE_DIR" not in ours.env
    assert ours.settings["converted"] is None


def test_drivers_are_read_without_their_engines() -> None:
    for peer in PEERS.values():
        for path in (peer.driver, peer.converter):
            if path is not None:
                script = _import_file(str(path))
                assert callable(script.load if path == peer.driver else script.convert)
    assert CHILD.is_file()


def rotated(rows: np.ndarray, angles: np.ndarray, neighbours: bool) -> np.ndarray:
    """Heads, [H, D], with each of the D/2 pairs turned by its angle; a pair is either two
    neighbours, or the same place in both halves."""
    heads, width = rows.shape
    pairs = rows.reshape(heads, width // 2, 2)
    if not neighbours:
        pairs = rows.reshape(heads, 2, width // 2).swapaxes(1, 2)
    cos, sin = np.cos(angles), np.sin(angles)
    x, y = pairs[..., 0], pairs[..., 1]
    return np.stack([x * cos - y * sin, x * sin + y * cos], -1)


def test_rows_change_places_with_the_rotation() -> None:
    """What llama.cpp makes of the changed rows scores as what Hugging Face makes of the others."""
    rng = np.random.default_rng(5)
    heads, width, hidden = 3, 8, 10
    query, key = rng.normal(size=(2, heads * width, hidden))
    x, angles = rng.normal(size=hidden), rng.normal(size=width // 2)

    def scores(neighbours: bool) -> np.ndarray:
        weights = (llama_cpp_convert._pairs(w, heads) if neighbours else w for w in (query, key))
        q, k = ((w @ x).reshape(heads, width) for w in weights)
        turned = rotated(q, angles, neighbours), rotated(k, 2 * angles, neighbours)
        return (turned[0] * turned[1]).sum((1, 2))

    np.testing.assert_allclose(scores(True), scores(False), rtol=1e-12)
    assert not np.allclose(rotated(query[:, 0].reshape(heads, width), angles, True).sum((1, 2)), 0)


def test_tensors_are_read_as_they_are_stored(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    values = rng.normal(size=(4, 6)).astype(np.float32)
    tensors = {
        "a": values.astype(ml_dtypes.bfloat16),
        "b": values.astype(np.float16),
        "c": values[0],
    }
    kinds = {"a": "BF16", "b": "F16", "c": "F32"}
    write_safetensors(tmp_path / "model.safetensors", tensors, kinds)
    found = dict(llama_cpp_convert._tensors(tmp_path))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], tensor.astype(np.float32))
    assert llama_cpp_convert._gguf_name("model.layers.7.mlp.up_proj.weight") == (
        "blk.7.ffn_up.weight"
    )
    with pytest.raises(ValueError, match="has no place"):
        llama_cpp_convert._gguf_name("model.layers.7.self_attn.q_norm.weight")
