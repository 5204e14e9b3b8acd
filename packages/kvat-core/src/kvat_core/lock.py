"""One writer per journal: a lock file that names its owner, so that one left behind by the dead is known as such."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import psutil
from pydantic import ValidationError

from kvat_core import outputs
from kvat_core.errors import CannotWrite, UsageError
from kvat_core.schema import Record, digest


class Owner(Record):
    """A process that no other one can be mistaken for: ids come back, but not with the same start in the same boot."""

    pid: int
    boot: str
    """Digest of what the system calls this boot."""
    started: float
    """Of the process, seconds since the epoch."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, and remove it at the end.

    Raises:
        UsageError: a living process holds it.
        CannotWrite: the file cannot be made.
    """
    with _opened(path) as file:
        _flock(file, path)
        if (owner := _owner(file)) is not None and _is_alive(owner):
            raise _held(path, owner)
        try:
            _sign(file, path)
            yield
        finally:
            path.unlink(missing_ok=True)


def refuse_if_held(path: Path) -> None:
    """Raise `UsageError` if a living process holds the lock file `path`."""
    if outputs.is_path(str(path)):
        with locked(path):
            pass


def is_held(path: Path) -> bool:
    """Whether a living process of this machine holds the lock file; nothing is touched."""
    try:
        with path.open("rb") as file:
            owner = _owner(file)
    except OSError:
        return False
    return owner is not None and _is_alive(owner)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("a+b", buffering=0)
    except OSError as error:
        raise _unwritable(path, error) from error


def _sign(file: BinaryIO, path: Path) -> None:
    try:
        file.truncate(0)
        file.write(_myself().model_dump_json().encode())
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> CannotWrite:
    return CannotWrite(f"{path} cannot be written ({error.strerror}); mend that, then try again")


def _flock(file: BinaryIO, path: Path) -> None:
    """The kernel drops this with the process; where a file system has none, the owner in the file decides."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _held(path, _owner(file)) from error
    except OSError:
        return
    # Its owner may have removed it between our opening and our locking; then it locks nothing.
    if not _is_at(path, file):
        raise _held(path, None)


def _is_at(path: Path, file: BinaryIO) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    return False


def _held(path: Path, owner: Owner | None) -> UsageError:
    who = "another process" if owner is None else f"process {owner.pid}"
    return UsageError(f"{who} is writing into {path.parent}; wait for its end, or name another --out")


def _owner(file: BinaryIO) -> Owner | None:
    file.seek(0)
    try:
        return Owner.model_validate_json(file.read())
    except ValidationError:
        return None  # new, or torn by the death of its writer


def _myself() -> Owner:
    return Owner(pid=os.getpid(), boot=_boot(), started=psutil.Process().create_time())


def _is_alive(owner: Owner) -> bool:
    if owner == _myself() or owner.boot != _boot() or not psutil.pid_exists(owner.pid):
        # In this process a lock that could be had is one that was given back.
        return False
    with contextlib.suppress(psutil.Error):
        return psutil.Process(owner.pid).create_time() == owner.started
    return False


def _boot() -> str:
    name = Path("/proc/sys/kernel/random/boot_id")
    return digest(name.read_text() if name.is_file() else round(psutil.boot_time()))
