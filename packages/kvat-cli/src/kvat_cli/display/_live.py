"""The live table of a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import astuple
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvat_cli.display._known import rows, state
from kvat_report import one_line

if TYPE_CHECKING:
    from kvat_core.tuner import Progress

_COLUMNS = ("candidate", "scenario", "samples", "TTFT", "decode", "failure")


class LiveTable:
    """Redrawn when something has happened, and gone at the end; a context manager."""

    def __init__(self) -> None:
        # No refresh by a timer: it would run beside the timed calls and disturb them.
        self._live = Live(console=Console(), auto_refresh=False, transient=True)
        self._lost = False

    def __enter__(self) -> LiveTable:
        self._try(self._live.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Show this moment of a run."""
        if not self._lost:
            self._try(lambda: self._live.update(_picture(progress), refresh=True))

    def _try(self, show: Callable[[], None]) -> None:
        """Show something. A terminal that is gone costs no result, and is left alone: rich would pile up the rest."""
        try:
            show()
        except OSError:
            self._lost = True


def _picture(progress: Progress) -> Group:
    activity = Text(one_line(progress.activity))
    if progress.run is None:
        return Group(activity)
    table = Table(*_COLUMNS)
    for row in rows(progress.run):
        # Text, because a plain string would be read as markup.
        table.add_row(*(Text(one_line(cell)) for cell in astuple(row)))
    return Group(activity, Text(state(progress)), table)
