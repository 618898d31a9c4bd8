"""A virtual environment for each engine, installed once and kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ellm_jax.bench.peers.catalogue import Peer
from ellm_jax.bench.peers.commands import clean_environment, run_logged

_DONE = "ellm-peer.json"
"""In an environment that is whole: what was installed."""


def default_folder() -> Path:
    """Where environments and converted models are kept unless said otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ellm_jax" / "peers"


@dataclass(frozen=True)
class Installer:
    """Makes environments.

    Attributes:
        folder: that holds them.
        python: the interpreter that they are made with.
        torch_index: where pip also looks for a CPU build of torch; "": nowhere else.
        pip_args: further arguments of `pip install`.
        reinstall: make them anew.
        timeout_s: most seconds for one.
    """

    folder: Path
    python: str
    torch_index: str = ""
    pip_args: tuple[str, ...] = ()
    reinstall: bool = False
    timeout_s: float = 3600.0

    def environment(self, peer: Peer) -> Path:
        """The folder of the engine's environment; installed if it is not there.

        Raises:
            PeerError: it cannot be installed; says what pip said.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        home = self.folder / peer.name
        wanted = {
            "python": self.python,
            "requirements": list(peer.requirements),
            "removed": list(peer.removed),
        }
        if not self.reinstall and _installed(home) == wanted:
            return home
        # What an interrupted installation left is no start to build on.
        shutil.rmtree(home, ignore_errors=True)
        log = self.folder / f"{peer.name}.log"
        log.unlink(missing_ok=True)
        env = clean_environment()
        run_logged([self.python, "-m", "venv", str(home)], log, env=env, timeout_s=self.timeout_s)
        index = []
        if peer.needs_torch and self.torch_index:
            index = ["--extra-index-url", self.torch_index]
        pip = [str(python_of(home)), "-I", "-m", "pip"]
        install = [*pip, "install", "--no-input", "--disable-pip-version-check", *index]
        run_logged(
            [*install, *self.pip_args, *peer.requirements], log, env=env, timeout_s=self.timeout_s
        )
        if peer.removed:
            remove = [*pip, "uninstall", "--yes", *peer.removed]
            run_logged(remove, log, env=env, timeout_s=self.timeout_s)
        (home / _DONE).write_text(json.dumps(wanted), encoding="utf-8")
        return home


def python_of(environment: Path) -> Path:
    """The interpreter of an environment."""
    return environment / "bin" / "python"


def _installed(environment: Path) -> Mapping[str, object] | None:
    try:
        found = json.loads((environment / _DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
