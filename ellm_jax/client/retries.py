"""When a call that failed is tried again, and after how long."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from ellm_jax.client.errors import ClientError


@dataclass(frozen=True)
class Retries:
    """Tries again what failed with UNAVAILABLE, after a random part of a time that doubles ("full
    jitter": many clients that fail together do not come back together). A server that says when
    to come back is believed. A stream whose first message has come is never begun again.

    Attributes:
        attempts: most tries in all; 1 for none but the first.
        first_s: most seconds before the second try.
        max_s: most seconds before any try.
        codes: statuses that are tried again.
        random: gives numbers from 0 to 1.
    """

    attempts: int = 4
    first_s: float = 0.2
    max_s: float = 5.0
    codes: tuple[grpc.StatusCode, ...] = (grpc.StatusCode.UNAVAILABLE,)
    random: Callable[[], float] = field(default=random.random, repr=False)

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts={self.attempts}: must be 1 or more; 1 tries only once")


class Attempts:
    """The tries of one call."""

    def __init__(self, retries: Retries, timeout_s: float | None):
        """`timeout_s`: seconds that the call may take with all its tries; None: no limit."""
        self._retries = retries
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._failed = 0

    def left_s(self) -> float | None:
        """Seconds that the next try may take; None: no limit."""
        return None if self._end_s is None else max(0.0, self._end_s - time.monotonic())

    def pause_s(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next try.

        Raises:
            ClientError: there is none: the error is final, tries have run out, or time has.
        """
        failed = ClientError.of(error)
        self._failed += 1
        retries = self._retries
        if failed.code not in retries.codes or self._failed >= retries.attempts:
            raise failed from error
        ceiling_s = min(retries.max_s, retries.first_s * 2 ** (self._failed - 1))
        pause_s: float = ceiling_s * retries.random()
        if failed.retry_after_s is not None:
            pause_s = max(pause_s, failed.retry_after_s)
        left_s = self.left_s()
        if left_s is not None and pause_s >= left_s:
            raise failed from error
        return pause_s
