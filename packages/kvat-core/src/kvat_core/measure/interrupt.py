"""How a user ends a run: asked once it ends with what it has, asked twice it ends at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kvat_core.errors import BudgetUsedUp, Interrupted


class Stop:
    """A wish to end that the run looks at wherever it waits."""

    def __init__(self) -> None:
        self.asked = False
        self._until: float | None = None

    def at(self, moment: float) -> None:
        """End the run when `time.monotonic()` has come to a moment, with what it has by then."""
        self._until = moment

    def ask(self) -> None:
        """End the run: what is being measured is dropped, what has been measured is used."""
        self.asked = True

    def check(self) -> None:
        """Go on unless asked to end.

        Raises:
            Interrupted: somebody asked.
            BudgetUsedUp: its time is over.
        """
        if self.asked:
            raise Interrupted("interrupted")
        if self._until is not None and time.monotonic() >= self._until:
            raise BudgetUsedUp("the time that the run may take is used up")


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """A `Stop` that Ctrl-C and SIGTERM ask; a lost terminal is ignored. For the main thread only.

    The second such signal raises `KeyboardInterrupt` where the run is, whose context managers kill the
    worker at once.
    """
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.ask()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
