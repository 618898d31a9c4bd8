"""The error of this package."""

from __future__ import annotations


class DeviceError(ValueError):
    """The device that was asked for cannot be had: what there is, and one remedy."""
