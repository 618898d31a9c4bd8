"""Where the host loop's time goes, what it saw, and what it has to do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Load:
    """How many requests are where; completions of one prompt count each.

    Attributes:
        running: with a slot, part of the steps.
        waiting: with no memory yet, or none any more.
        moving: between device and host memory.
        offloaded: in host memory only.
    """

    running: int
    waiting: int
    moving: int
    offloaded: int


@dataclass
class LoopStats:
    """Where the loop's time went, and what it saw; seconds and counts since the last reset.

    Attributes:
        plan_s: planning steps, without mapping.
        map_s: reserving memory: mapping and unmapping chunks, moving them between owners.
        dispatch_s: packing inputs, and in the jitted call.
        wait_s: waiting for the device.
        settle_s: handing tokens out, text and stop checks included.
        compile_s: compiling steps that no compiled one could stand for.
        steps: steps settled.
        decode_s: time of steps in which at least one request decoded.
        decode_tokens: tokens that such steps gave to requests that decoded.
        peak_running: most requests that ran at once.
        started: requests that began to run.
        prefix_hits: those of them of whose prompt a part was found instead of computed.
        preemptions: how often a request lost its memory and had to compute it again.
        prompt_tokens: of the requests that began to run.
        cached_tokens: those of them that were found instead of computed.
        output_tokens: tokens that requests were given.
        moves: moves of memory by kind (see `MemoryEvent`).
        moved_bytes: how much they moved.
        compiled_steps: steps compiled since the engine was made, those in the background included.
    """

    plan_s: float = 0.0
    map_s: float = 0.0
    dispatch_s: float = 0.0
    wait_s: float = 0.0
    settle_s: float = 0.0
    compile_s: float = 0.0
    steps: int = 0
    decode_s: float = 0.0
    decode_tokens: int = 0
    peak_running: int = 0
    started: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    moves: dict[str, int] = field(default_factory=dict)
    moved_bytes: dict[str, int] = field(default_factory=dict)
    compiled_steps: int = 0

    def reset(self) -> None:
        """Starts anew."""
        vars(self).update(vars(LoopStats()))

    @contextlib.contextmanager
    def timed(self, field_name: str) -> Iterator[None]:
        """Adds the time of a with-block to one of the fields in seconds."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            setattr(self, field_name, getattr(self, field_name) + spent)
