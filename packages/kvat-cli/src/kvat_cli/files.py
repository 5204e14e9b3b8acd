"""Files that a command writes where its user says."""

from __future__ import annotations

from pathlib import Path

from kvat_core.errors import UsageError


def write_new(path: Path, text: str, option: str) -> None:
    """Write a file that is not there yet.

    Raises:
        UsageError: it is there, and left as it is, or the system refuses; the message names the option to change.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except BaseException:
                path.unlink()  # half of it would be in the way of the next try
                raise
    except FileExistsError as error:
        raise UsageError(f"{path} exists and is left as it is; name a new file with {option}") from error
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name another file with {option}") from error
