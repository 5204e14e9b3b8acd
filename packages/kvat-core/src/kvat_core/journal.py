"""The journal: an append-only file that holds everything that happened in a run.

One JSON object per line: `{"seq", "crc32", "type", "payload"}`. `crc32` covers the canonical
JSON of the other three, so damage is found wherever it is. A record is on disk before
anything else happens with it. What a crash may leave at the end, bytes without a line end,
is no record; it is kept aside when the journal is continued.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import from_json
from typing_extensions import Self

from kvat_core import outputs
from kvat_core.errors import CannotWrite, JournalDamaged
from kvat_core.schema import EVENT_TYPES, Event

_NAMES = {record: name for name, record in EVENT_TYPES.items()}
TORN = ".torn"
"""Suffix of the file that keeps what a crash left after the last whole line."""


class Journal:
    """Writer at the end of a journal; a context manager. Made by `create_journal` or `continue_journal`.

    Args:
        path: the file.
        descriptor: of the file, open for writing at its end.
        seq: number of the next record.
    """

    def __init__(self, path: Path, descriptor: int, seq: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._seq = seq

    def append(self, event: Event) -> None:
        """Write one record and force it to disk.

        Raises:
            CannotWrite: the system refuses, e.g. for a full disk; the records before are whole.
        """
        line = _encode(self._seq, event)
        size = os.fstat(self._descriptor).st_size
        try:
            _write_all(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):  # part of a line is a torn end, which is no record either
                os.ftruncate(self._descriptor, size)
            kept = (
                "what was measured before is in it: mend that, then go on with --resume"
                if self._seq
                else "nothing was measured yet: mend that, then start anew with --force"
            )
            raise CannotWrite(f"{self.path} cannot be written ({error.strerror}); {kept}") from error
        self._seq += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def create_journal(path: Path) -> Journal:
    """A new journal.

    Raises:
        FileExistsError: the file is already there; a journal is never overwritten.
        CannotWrite: it cannot be created.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise
    except OSError as error:
        raise CannotWrite(f"{path} cannot be created ({error.strerror}); name another --out") from error
    outputs.sync_directory(path.parent)
    return Journal(path, descriptor, 0)


def continue_journal(path: Path) -> tuple[list[Event], Journal]:
    """All records of a journal, and its writer; a torn end is moved into a file beside it first.

    Raises:
        JournalDamaged: a whole line does not verify; nothing was changed.
        CannotWrite: it cannot be written.
    """
    events = list(read_journal(path))
    try:
        _cut_torn_end(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written ({error.strerror}); mend that, then try again") from error
    return events, Journal(path, descriptor, len(events))


def read_journal(path: Path) -> Iterator[Event]:
    """All records in order, without a torn end.

    Raises:
        JournalDamaged: a whole line does not verify; the message names it.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                return
            try:
                yield _decode(number, line)
            except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
                raise JournalDamaged(
                    f"{path}: line {number + 1} is damaged; nothing was read from there on "
                    "and nothing was changed: restore the file, or measure anew with kvat tune --force"
                ) from error


def journal_sha256(path: Path) -> str:
    """Digest that a plan carries of its evidence."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cut_torn_end(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.with_name(path.name + TORN).open("ab") as aside:
            aside.write(data[whole:])
            aside.flush()
            os.fsync(aside.fileno())
        with path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _canonical(seq: int, name: str, payload: Any) -> str:
    return json.dumps({"seq": seq, "type": name, "payload": payload}, separators=(",", ":"), sort_keys=True)


def _encode(seq: int, event: Event) -> bytes:
    name = _NAMES[type(event)]
    payload = event.model_dump(mode="json")
    crc32 = zlib.crc32(_canonical(seq, name, payload).encode())
    line = {"seq": seq, "crc32": crc32, "type": name, "payload": payload}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _decode(number: int, line: bytes) -> Event:
    record = from_json(line)
    if record["seq"] != number:
        raise ValueError("out of order")
    canonical = _canonical(record["seq"], record["type"], record["payload"])
    if zlib.crc32(canonical.encode()) != record["crc32"]:
        raise ValueError("checksum")
    return cast("Event", EVENT_TYPES[record["type"]].model_validate(record["payload"]))
