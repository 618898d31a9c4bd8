"""A driver without an engine, for tests of what drives engines: answers as its settings say.

Like real ones it is loaded by path, where nothing else of the tests is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

_HOG = "import sys, time; held = bytearray({}); print(flush=True); time.sleep(60)"


class _Model:
    def __init__(self, settings: dict[str, Any]):
        self._settings = settings
        self.precision = settings.get("precision", "bfloat16")
        self.versions = {
            "fake": "1.5",
            "pid": str(os.getpid()),
            "cores": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        }

    def warm_up(self) -> None:
        # Whatever an engine prints must not be taken for an answer.
        print("compiling", flush=True)
        if self._settings.get("hog_bytes"):
            hog = [sys.executable, "-c", _HOG.format(self._settings["hog_bytes"])]
            process = subprocess.Popen(hog, stdout=subprocess.PIPE)
            assert process.stdout is not None
            process.stdout.readline()

    def generate(self, prompts: list[list[int]], output_tokens: list[int], recorder: Any) -> None:
        mood = self._settings.get("mood")
        # Only what is asked of several is answered otherwise.
        if len(prompts) == 1:
            mood = None
        if mood == "dies":
            print("it hurts", file=sys.stderr)
            os._exit(3)
        if mood == "hangs":
            time.sleep(1000)
        if mood == "refuses":
            raise RuntimeError("no room")
        for index, (prompt, count) in enumerate(zip(prompts, output_tokens, strict=True)):
            for step in range(count - (mood == "stops early")):
                time.sleep(self._settings.get("token_s", 0.002))
                recorder.token(index, (sum(prompt) + step) % 100)


def load(settings: dict[str, Any]) -> _Model:
    if settings.get("mood") == "does not load":
        raise ValueError("there is no such precision")
    return _Model(settings)


def convert(source: str, target: str, precision: str) -> None:
    with open(f"{source}/tokenizer.json") as tokenizer, open(f"{source}/config.json") as config:
        assert tokenizer.read()
        assert config.read()
    if precision == "int4":
        raise ValueError("there is no int4")
    os.mkdir(target)
    with open(f"{target}/made", "w") as file:
        file.write(str(time.monotonic_ns()))
