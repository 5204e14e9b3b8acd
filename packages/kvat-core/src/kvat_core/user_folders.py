"""Where a user's files are kept, as the XDG Base Directory Specification says; it has relative paths ignored."""

from __future__ import annotations

import os
from pathlib import Path


def config_home() -> Path:
    """Folder of this user's own settings.

    Raises:
        RuntimeError: the user has no home.
    """
    return _named("XDG_CONFIG_HOME") or Path.home() / ".config"


def cache_home() -> Path:
    """Folder of what can be made again.

    Raises:
        RuntimeError: the user has no home.
    """
    return _named("XDG_CACHE_HOME") or Path.home() / ".cache"


def _named(variable: str) -> Path | None:
    named = Path(os.environ.get(variable, ""))
    return named if named.is_absolute() else None
