"""Where the host loop's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class LoopStats:
    """Where the loop's time went, and what it saw; seconds and counts since the last reset.

    Attributes:
        plan_s: planning steps and packing their inputs, without mapping.
        map_s: reserving memory: mapping and unmapping chunks.
        dispatch_s: in the jitted call.
        wait_s: waiting for the device.
        settle_s: handing tokens out, text and stop checks included.
        compile_s: compiling steps that no compiled one could stand for.
        steps: steps settled.
        peak_running: most requests that ran at once.
        preemptions: how often a request lost its memory.
    """

    plan_s: float = 0.0
    map_s: float = 0.0
    dispatch_s: float = 0.0
    wait_s: float = 0.0
    settle_s: float = 0.0
    compile_s: float = 0.0
    steps: int = 0
    peak_running: int = 0
    preemptions: int = 0

    @contextlib.contextmanager
    def timed(self, field_name: str) -> Iterator[None]:
        """Adds the time of a with-block to one of the fields in seconds."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            setattr(self, field_name, getattr(self, field_name) + spent)
