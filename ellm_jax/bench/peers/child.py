"""The process around a driver: what runs in an engine's environment, and answers `session`.

    python child.py serve DRIVER.py CORES      answers lines of JSON on standard input
    python child.py convert CONVERTER.py SOURCE TARGET PRECISION

A driver has `load(settings)`, which returns a model with

    versions       {package: version}
    precision      what it really computes in
    warm_up()      compiles what it would else compile while a clock runs
    generate(prompts, output_tokens, recorder)
                   answers all requests, greedily, each with exactly so many tokens, whatever ends
                   a text; tells the recorder of tokens as they come

A line asks {"do": "load", ...settings}, {"do": "warm_up"}, {"do": "run", "prompts": ...,
"output_tokens": ...} or {"do": "quit"}; the answer is {"ok": true, ...} or {"ok": false, "error":
...}. Needs nothing but the standard library.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

_ERROR_CHARACTERS = 600


class Recorder:
    """Notes the tokens of each answer, and when the first and the last came.

    Times are seconds of `time.monotonic`, so a driver may bring those that its engine noted.
    """

    def __init__(self, requests: int):
        self.start_s = time.monotonic()
        self._tokens: list[list[int]] = [[] for _ in range(requests)]
        self._first_s: list[float | None] = [None] * requests
        self._last_s: list[float | None] = [None] * requests

    def token(self, request: int, token: int) -> None:
        """Notes that a request just got its next token."""
        self.answer(request, [token], time.monotonic(), time.monotonic())

    def answer(self, request: int, tokens: Sequence[int], first_s: float, last_s: float) -> None:
        """Notes tokens of which the first came at one time and the last at another."""
        if self._first_s[request] is None:
            self._first_s[request] = first_s
        self._last_s[request] = last_s
        self._tokens[request] += [int(token) for token in tokens]

    def to_list(self) -> list[dict[str, Any]]:
        """For JSON, times counted from the start."""
        return [
            {"tokens": tokens, "first_s": self._since(first), "last_s": self._since(last)}
            for tokens, first, last in zip(self._tokens, self._first_s, self._last_s, strict=True)
        ]

    def _since(self, at_s: float | None) -> float | None:
        return None if at_s is None else at_s - self.start_s


class _Server:
    def __init__(self, driver: Any):
        self._driver = driver
        self._model: Any = None
        self._answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "load": self._load,
            "warm_up": self._warm_up,
            "run": self._run,
        }

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"ok": True, **self._answers[asked.pop("do")](asked)}
        except Exception as error:
            # Whatever an engine raises is its answer; the next request may still go well.
            return {"ok": False, "error": f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]}

    def _load(self, settings: dict[str, Any]) -> dict[str, Any]:
        self._model = self._driver.load(settings)
        return {"versions": self._model.versions, "precision": self._model.precision}

    def _warm_up(self, _: dict[str, Any]) -> dict[str, Any]:
        self._model.warm_up()
        return {}

    def _run(self, asked: dict[str, Any]) -> dict[str, Any]:
        recorder = Recorder(len(asked["prompts"]))
        self._model.generate(asked["prompts"], asked["output_tokens"], recorder)
        return {"answers": recorder.to_list()}


def _import_file(path: str) -> Any:
    """Imports a file under a name that hides no package of the environment."""
    spec = importlib.util.spec_from_file_location("ellm_peer_script", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _take_stdout() -> IO[str]:
    """A private copy of standard output; what engines print goes to stderr from here on."""
    private = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(private, "w", encoding="utf-8")


def _serve(script: str, cores: str) -> None:
    answers = _take_stdout()
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    server = _Server(_import_file(script))
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "quit":
            break
        answers.write(json.dumps(server.answer(asked)) + "\n")
        answers.flush()
    answers.flush()
    # Not through the engine's exit handlers: some wait for threads of theirs for ever.
    os._exit(0)


def main(argv: Sequence[str]) -> None:
    """Serves or converts, as the arguments say."""
    kind, script, *rest = argv
    if kind == "serve":
        _serve(script, *rest)
    else:
        _import_file(script).convert(*rest)


if __name__ == "__main__":
    main(sys.argv[1:])
