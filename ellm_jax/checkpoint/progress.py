"""Telling how far a load has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

# Called with bytes loaded and bytes in total.
ProgressCallback = Callable[[int, int], None]
# Called with the bytes just loaded.
Advance = Callable[[int], None]


@contextmanager
def report(progress: bool | ProgressCallback, label: str, total_bytes: int) -> Iterator[Advance]:
    """A bar on stderr (True), a callback, or silence (False)."""
    if progress is True:
        with tqdm(
            total=total_bytes, desc=label, unit="B", unit_scale=True, unit_divisor=1024
        ) as bar:
            yield bar.update
        return
    done_bytes = 0

    def advance(count_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += count_bytes
        if progress is not False:
            progress(done_bytes, total_bytes)

    yield advance
