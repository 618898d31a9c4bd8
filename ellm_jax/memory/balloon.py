"""How much XLA's allocator may keep of what it has taken, and how it is made to give the rest back.

The ledger says how many bytes weights, the engine's arrays and activations may hold together; a
balloon makes it so in the allocator that they come from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from ellm_jax.memory.device_pool import DevicePool

_log = logging.getLogger(__name__)

_EVERYTHING = 1 << 62


class Balloon(Protocol):
    """What the ledger asks of the allocator that steps take their memory from."""

    @property
    def retained_bytes(self) -> int:
        """What it keeps at most of a step's memory for the next step without being told."""

    def keep(self, count_bytes: int) -> None:
        """From now on it may hold so many bytes in all. Raises nothing: speed depends on it, not
        correctness."""

    def trim(self, keep_bytes: int) -> None:
        """Gives back now what it holds unused beyond so many bytes in all.

        Raises:
            RuntimeError: the system refuses, or a step in flight fails.
        """


class HeapBalloon:
    """The C heap, where XLA takes memory on a CPU. What a step takes in large pieces goes back when
    it ends, without being told."""

    def __init__(self, retained_bytes: int, trim: Callable[[], object]):
        """Args:
        retained_bytes: the size of pieces up to which the heap keeps them.
        trim: gives unused heap back.
        """
        self.retained_bytes = retained_bytes
        self._trim = trim

    def keep(self, count_bytes: int) -> None:
        """The heap needs no telling."""

    def trim(self, keep_bytes: int) -> None:
        """Gives back all that is unused: the heap knows no amount."""
        self._trim()


class DeviceBalloon:
    """The memory pool of a GPU.

    Nothing goes back at the end of a step: the next one would have to take it from the driver
    again. It goes when KV is short of it. Then the steps in flight are waited for, because memory
    that a stream has freed without the host knowing cannot be trimmed.
    """

    retained_bytes = _EVERYTHING

    def __init__(self, pool: DevicePool, settle: Callable[[], object]):
        """Args:
        pool: of the device.
        settle: waits for the steps in flight.
        """
        self.pool = pool
        self._settle = settle

    def keep(self, count_bytes: int) -> None:
        """Sets the release threshold."""
        try:
            self.pool.keep(count_bytes)
        except RuntimeError as error:
            _log.warning("the driver keeps another amount for steps than it should: %s", error)

    def trim(self, keep_bytes: int) -> None:
        """Lowers the release threshold, waits for the device, and trims its pool."""
        self._settle()
        self.pool.keep(keep_bytes)
        self.pool.synchronize()
        self.pool.trim(keep_bytes)
