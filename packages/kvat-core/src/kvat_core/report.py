"""The contract between kvat and a report renderer, and nothing else.

A package registers a class under the entry-point group `kvat.reports`:

    [project.entry-points."kvat.reports"]
    mine = "kvat_report_mine:MineReport"
"""

from __future__ import annotations

from typing import Protocol

from kvat_core.schema import Plan


class Report(Protocol):
    """Turns a finished plan into one text file.

    The class is created without arguments and used from one thread. Importing its module should be
    cheap, since every command that writes reports imports all of them; heavy imports belong in `render`.
    """

    name: str
    """Name under which the user selects it; equal to the entry point's name."""
    file_name: str
    """File to write it to, inside the run's directory: a plain name with its suffix, e.g. ``report.md``."""

    def render(self, plan: Plan) -> str:
        """The whole text of the file, for the plan alone: no file or network access, no clock.

        Equal plans give equal texts, so a report can be written again at any time.
        """
