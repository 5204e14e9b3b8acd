"""The strategies that are installed."""

from __future__ import annotations

from typing import Any

from kvat_core.discovery import Unusable, check_name, load_named
from kvat_core.errors import UsageError
from kvat_core.search._base import Search

SEARCHES = "kvat.searches"
"""Entry-point group of search strategies."""


def find_search(name: str) -> type[Search]:
    """The search strategy of that name.

    Raises:
        UsageError: not installed, broken, registered twice, or unavailable here.
    """
    found = load_named(SEARCHES, "search", name, _checked)
    if reason := found.unavailable():
        raise UsageError(reason)
    return found


def _checked(name: str, found: Any) -> type[Search]:
    if not (isinstance(found, type) and issubclass(found, Search)):
        raise Unusable("broken", "its entry point names no subclass of kvat_core.search.Search")
    check_name(name, found)
    return found
