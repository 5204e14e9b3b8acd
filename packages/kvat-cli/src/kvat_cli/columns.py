"""Text in columns, for terminals and pipes alike."""

from __future__ import annotations

from collections.abc import Sequence

from kvat_report.text import one_line


def columns(rows: Sequence[Sequence[str]]) -> str:
    """The rows as lines with aligned cells; foreign strings are made safe."""
    safe = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*safe, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in safe
    )
