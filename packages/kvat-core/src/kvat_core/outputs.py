"""The files of a run: where they may go, and how they get there whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kvat_core.errors import CannotWrite, UsageError

JOURNAL = "journal.jsonl"
LOCK = "journal.lock"
PLAN = "best_plan.json"
SNIPPET = "snippet.py"


def check_out(out: Path, *, force: bool, resume: bool) -> None:
    """Refuse a directory that cannot be used, before any work, touching nothing.

    Raises:
        UsageError: it is a file, not empty (without `force` or `resume`), without a journal (with `resume`), or
            cannot be written.
    """
    try:
        if not resume:
            _refuse_unusable(out, force)
        elif not (out / JOURNAL).is_file():
            raise UsageError(f"--out {out} has no {JOURNAL} to go on with; leave --resume out")
        existing = next(path for path in [out, *out.absolute().parents] if path.exists())
    except OSError as error:
        raise UsageError(f"--out {out} cannot be used: {error.strerror}; name another directory") from error
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        raise UsageError(f"--out {out} cannot be written ({existing} is not a writable directory); name another one")


def open_out(out: Path, force: bool) -> None:
    """Create the directory; what an earlier run left there is moved aside with `force`, and never deleted.

    Of a symbolic link it is the place that it leads to.

    Raises:
        UsageError: it has been filled meanwhile (without `force`), or the system refuses.
    """
    try:
        _refuse_unusable(out, force)
        place = Path(os.path.realpath(out))
        if place.is_dir() and any(place.iterdir()):
            place.rename(_free_name(place))
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be used: {error.strerror}; name another directory") from error


def _refuse_unusable(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a new or empty directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        goes_on = "go on with its run with --resume, " if (out / JOURNAL).is_file() else ""
        raise UsageError(f"--out {out} is not empty; {goes_on}name another directory, or move it aside with --force")
    if Path.cwd().is_relative_to(out.resolve()):
        raise UsageError(
            f"--out {out} is where you are, or above it, and cannot be moved aside; name another directory"
        )


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return aside


def set_aside(path: Path) -> str:
    """Give a file that no longer tells the truth another name; it is never deleted. What became of it, in words."""
    try:
        return f"{path.name} is of before and now called {path.rename(_free_name(path)).name}"
    except OSError as error:
        return f"{path.name} is of before, do not use it; it cannot be moved aside ({error.strerror})"


def is_path(text: str) -> bool:
    """Whether a file or directory has this name; what cannot be a name is none."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def write_files(out: Path, files: Mapping[str, str]) -> tuple[Path, ...]:
    """Write each file whole or not at all: a temporary file beside it, moved into place.

    Raises:
        CannotWrite: the system refuses, e.g. for a full disk; what was there before is unchanged.
    """
    return tuple(_write(out / name, text) for name, text in files.items())


def _write(path: Path, text: str) -> Path:
    try:
        replace_file(path, text)
    except OSError as error:
        raise CannotWrite(
            f"{path} cannot be written ({error.strerror}); all that was measured is in {JOURNAL}: mend that, "
            "then write it with --resume"
        ) from error
    return path


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all, by way of a temporary one beside it.

    Raises:
        OSError: the system refuses; what was there before is unchanged.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Have the names of its files survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
