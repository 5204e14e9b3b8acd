"""The minutes of one call of the benchmark."""

from __future__ import annotations

import time


class Stage:
    """From its construction on."""

    def __init__(self, minutes: float) -> None:
        self._end_s = time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        """Seconds to its end."""
        return self._end_s - time.monotonic()
