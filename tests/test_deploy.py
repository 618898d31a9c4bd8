"""What `deploy/` starts: its options are ours, and its times fit each other."""

import re
import shlex
from pathlib import Path

import pytest

from ellm_jax.cli import _parser

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFEST = DEPLOY / "kubernetes" / "cpu" / "ellm.yaml"


def unit_settings() -> dict[str, str]:
    text = (DEPLOY / "ellm.service").read_text().replace("\\\n", " ")
    pairs = (line.split("=", 1) for line in text.splitlines() if re.match(r"\w+=", line))
    return {name: value.strip() for name, value in pairs}


def manifest_args(path: Path) -> list[str]:
    return re.findall(r"^\s+(?:- |value: )(--[a-z-]+(?:=\S+)?)$", path.read_text(), re.MULTILINE)


def parsed(args: list[str]) -> dict[str, object]:
    return vars(_parser().parse_args(["serve", *args]))


def test_the_unit_starts_what_there_is():
    settings = unit_settings()
    command = shlex.split(settings["ExecStart"])
    assert command[:2] == ["/opt/ellm/bin/ellm", "serve"]
    found = parsed(command[2:])
    assert float(found["ServeConfig.drain_s"]) < float(settings["TimeoutStopSec"])
    assert "MemoryDenyWriteExecute" not in settings, "XLA could not run what it compiles"


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_manifests_start_what_there_is(variant):
    args = manifest_args(MANIFEST)
    assert len(args) >= 10
    if variant == "cuda":
        args += manifest_args(DEPLOY / "kubernetes" / "cuda" / "kustomization.yaml")
    found = parsed(args)
    assert found["api_keys_file"], "other pods reach it: it needs keys"
    text = MANIFEST.read_text()
    grace_s = int(re.search(r"terminationGracePeriodSeconds: (\d+)", text)[1])
    pause_s = int(re.search(r'command: \[sleep, "(\d+)"\]', text)[1])
    assert float(found["ServeConfig.drain_s"]) + pause_s < grace_s


def test_what_clients_upload_fits_its_volume():
    """Or the pod would be evicted; and what is compiled is no neighbour of it."""
    found = parsed(manifest_args(MANIFEST))
    text = MANIFEST.read_text()
    mounts = dict(re.findall(r"\{name: ([a-z]+), mountPath: (/\S+?)[,}]", text))
    sizes = dict(re.findall(r"- name: ([a-z]+)\n\s+emptyDir: \{sizeLimit: (\d+)Gi\}", text))
    directory = str(found["ServeConfig.files_dir"])
    assert [name for name, at in mounts.items() if directory.startswith(f"{at}/")] == ["files"]
    tenant_bytes = int(str(found["ServeConfig.max_tenant_file_bytes"]))
    assert int(sizes["files"]) * 2**30 > 4 * tenant_bytes
    total_gib = int(re.search(r"ephemeral-storage: (\d+)Gi", text)[1])
    assert total_gib > sum(int(size) for size in sizes.values())


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images_run_as_nobody_and_stop_when_told(name):
    text = (DEPLOY / name).read_text()
    last = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER 10001$", last, re.MULTILINE)
    assert "STOPSIGNAL SIGTERM" in last
    entry = re.search(r'^ENTRYPOINT \["ellm", "serve"\]\nCMD \[(.*)\]$', last, re.MULTILINE)
    found = parsed([word.strip(' "') for word in entry[1].split(",")])
    assert str(found["ServeConfig.http"]).startswith("127.0.0.1:")
