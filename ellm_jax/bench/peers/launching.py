"""How each engine's process is started: interpreter, cores, environment and settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ellm_jax.bench.peers.catalogue import CHILD, OUR_DRIVER, OURS, Peer
from ellm_jax.bench.peers.commands import clean_environment
from ellm_jax.bench.peers.cores import thread_variables
from ellm_jax.bench.peers.environments import python_of
from ellm_jax.bench.peers.session import Launch

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_CACHE_VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR")


class Launches:
    """Makes launches that share cores and a folder of caches.

    Each engine has a folder of its own for what it compiles, empty at first, so that a start with
    empty caches can be told from one with full ones.
    """

    def __init__(self, cores: Sequence[int], caches: Path, settings: Mapping[str, Any]):
        self._cores, self._caches, self._settings = cores, caches, settings

    def ours(self) -> Launch:
        """Our own engine, in this interpreter."""
        command = (sys.executable, "-P", str(CHILD), "serve", str(OUR_DRIVER))
        return self._launch(OURS, command, dict(os.environ), None)

    def peer(self, peer: Peer, environment: Path, converted: Path | None) -> Launch:
        """Another engine, in its environment."""
        # -I: nothing of ours, and nothing of the user's, is on its path.
        command = (str(python_of(environment)), "-I", str(CHILD), "serve", str(peer.driver))
        env = clean_environment()
        # Compilers and tools that were installed with it.
        env["PATH"] = f"{environment / 'bin'}{os.pathsep}{env.get('PATH', '')}"
        library = environment / peer.preload
        if peer.preload and library.is_file():
            env["LD_PRELOAD"] = str(library)
        return self._launch(peer.name, command, env, converted)

    def _launch(
        self, name: str, command: tuple[str, ...], env: dict[str, str], converted: Path | None
    ) -> Launch:
        cache = self._caches / name
        cache.mkdir(parents=True, exist_ok=True)
        for variable in _CACHE_VARIABLES:
            env.pop(variable, None)
        env |= thread_variables(len(self._cores)) | _OFFLINE | {"XDG_CACHE_HOME": str(cache)}
        env["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "torchinductor")
        settings = {**self._settings, "converted": None if converted is None else str(converted)}
        cores = ",".join(map(str, self._cores))
        return Launch(name, (*command, cores), env, settings)
