"""Kinds of traffic: the presets that ship with kvat, and the user's own."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvat_core.errors import UsageError
from kvat_core.profiles._fit import fit
from kvat_core.schema import FORMAT, Profile

__all__ = ["DEFAULT", "DEFAULT_NOTE", "fit", "load_profile", "presets"]

DEFAULT = "ci-micro"
DEFAULT_NOTE = (
    f"no profile was named, so {DEFAULT} is measured, a quick smoke test: name the --profile of your traffic before "
    "you rely on the result"
)


@cache
def presets() -> dict[str, Profile]:
    """The shipped profiles by name."""
    folder = files("kvat_core.profiles")
    texts = [entry.read_text(encoding="utf-8") for entry in folder.iterdir() if entry.name.endswith(".json")]
    profiles = sorted((Profile.model_validate_json(text) for text in texts), key=lambda profile: profile.name)
    return {profile.name: profile for profile in profiles}


def load_profile(name_or_path: str) -> Profile:
    """A preset by its name, or a profile from a JSON file.

    Raises:
        UsageError: neither; or the file is unreadable, not JSON, or not a profile.
    """
    if name_or_path in presets():
        return presets()[name_or_path]
    path = Path(name_or_path)
    if path.suffix != ".json" and not _is_file(path):
        known = ", ".join(presets())
        raise UsageError(f"unknown profile {name_or_path!r}; use one of {known}, or a JSON file (kvat schema profile)")
    return _from_file(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no name that a file can have
        return False


def _from_file(path: Path) -> Profile:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read profile {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"profile {path} is not JSON: {error}; see kvat schema profile") from error
    found = data.get("format") if isinstance(data, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise UsageError(f"profile {path} has format {found}, this kvat reads up to {FORMAT}; upgrade kvat-core")
    try:
        profile = Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise UsageError(f"profile {path}: {where}: {said}; see kvat schema profile") from error
    if profile != presets().get(profile.name, profile):
        raise UsageError(f"profile {path} has the name of the preset {profile.name} and is another one; rename it")
    return profile
