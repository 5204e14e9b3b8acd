"""From a plan to defaults in a model's directory, beside whatever the file there already says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from kvat_core import discovery
from kvat_core.engine import ConfigFile
from kvat_core.errors import CannotWrite, UsageError
from kvat_core.outputs import replace_file
from kvat_core.schema import Plan


@dataclass(frozen=True)
class ConfigChange:
    """A file as it would be; nothing is written before `write`."""

    path: Path
    text: str
    changes: tuple[str, ...]
    """Keys of an older file that get another value or are taken out, one line each."""
    lost: tuple[str, ...]
    """What the winner needs beside the file, one line each."""
    left: tuple[str, ...]
    """What stays with each call, one line each."""

    def write(self) -> None:
        """Put the file in place, whole or not at all.

        Raises:
            CannotWrite: the system refuses; what was there before is unchanged.
        """
        try:
            replace_file(self.path, self.text)
        except OSError as error:
            raise CannotWrite(f"{self.path} cannot be written ({error.strerror}); it is as it was before") from error


def config_change(plan: Plan, folder: Path) -> ConfigChange:
    """What a plan's winner makes of the file of defaults in a model's directory.

    Raises:
        NothingFeasible: the plan has no winner.
        UsageError: no such directory, it or the file there cannot be read, that is no JSON object, or the plan's engine
            is not installed, reads no such file, cannot express the winner in one, or names a file that is no plain
            name.
    """
    plan.require_winner()
    _require_directory(folder)
    file = discovery.load_engine(plan.engine.name).config_file(plan, folder)
    if file is None:
        raise UsageError(f"engine {plan.engine.name} reads no file of defaults; apply its plan as code")
    if PurePath(file.name).name != file.name:
        raise UsageError(f"engine {plan.engine.name} names a file {file.name!r}, which is no plain name; report that")
    path = folder / file.name
    before = _read(path)
    after = {key: value for key, value in before.items() if key not in file.replaces} | file.values
    return ConfigChange(
        path=path,
        text=json.dumps(after, indent=2) + "\n",
        changes=tuple(_changes(before, file)),
        lost=file.lost,
        left=file.left,
    )


def _require_directory(folder: Path) -> None:
    try:
        found = folder.is_dir()
    except OSError as error:  # no name that a directory can have, or one that may not be looked at
        raise UsageError(f"cannot look for {folder}: {error.strerror}; name the directory of a model") from error
    if not found:
        raise UsageError(f"there is no directory {folder}; name the directory of a model")


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; mend that or move it away") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON and is left as it is; mend it or move it away") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} is no JSON object and is left as it is; mend it or move it away")
    return data


def _changes(before: Mapping[str, Any], file: ConfigFile) -> Iterator[str]:
    for key, old in before.items():
        if key in file.values and file.values[key] != old:
            yield f"{key} was {json.dumps(old)}, is {json.dumps(file.values[key])}"
        elif key in file.replaces and key not in file.values:
            yield f"{key} was {json.dumps(old)}, is taken out"
