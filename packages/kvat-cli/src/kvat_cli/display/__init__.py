"""What `kvat tune` shows while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from kvat_cli.display._plain import PlainLines

if TYPE_CHECKING:
    from kvat_core.tuner import Progress

OnProgress = Callable[["Progress"], None]


def open_display(*, silent: bool) -> AbstractContextManager[OnProgress | None]:
    """A live table on a terminal, plain lines elsewhere, nothing when silent."""
    if silent:
        return nullcontext(None)
    if not sys.stdout.isatty():
        return nullcontext(PlainLines())
    from kvat_cli.display._live import LiveTable

    return LiveTable()
