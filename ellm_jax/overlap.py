"""Whether it pays to plan a step while the one before it runs.

It hides the host's work behind the device's. A request of which the host has to know the last token
before it can be planned again (`Request.decodes`) pays for it: it can only be part of every
other step.
"""

from __future__ import annotations

from dataclasses import dataclass

_WORTH = 1 / 20
"""Share of a step's time that the others may lose so that such requests are part of every step."""
_NEWEST = 1 / 8
"""Weight of the newest value in a running mean."""


@dataclass
class Overlap:
    """What the host's work takes beside the steps, as running means.

    Attributes:
        host_s: of the host between two steps, without waiting for the device.
        step_s: of a step.
    """

    host_s: float = 0.0
    step_s: float = 0.0

    def note_host(self, seconds: float) -> None:
        """Takes in what the host did for one step."""
        self.host_s += _NEWEST * (seconds - self.host_s)

    def note_step(self, seconds: float) -> None:
        """Takes in how long a step took."""
        self.step_s += _NEWEST * (seconds - self.step_s)

    @property
    def pays(self) -> bool:
        """Whether the others would lose more than they should without it."""
        return self.host_s > _WORTH * self.step_s
