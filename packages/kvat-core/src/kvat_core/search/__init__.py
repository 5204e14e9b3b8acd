"""What to measure next, decided from the journal alone: a search never measures."""

from kvat_core.search._base import Search
from kvat_core.search._grid import Grid

__all__ = ["Grid", "Search"]
