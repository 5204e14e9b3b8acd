"""The journal: an append-only file that holds everything that happened in a run.

One JSON object per line: `{"seq", "crc32", "type", "payload"}`. `crc32` covers the canonical
JSON of the other three, so damage is found wherever it is. A record is on disk before
anything else happens with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from pydantic import ValidationError
from typing_extensions import Self

from kvat_core.errors import JournalDamaged
from kvat_core.schema import EVENT_TYPES, Event

_NAMES = {record: name for name, record in EVENT_TYPES.items()}


class Journal:
    """Writer of a new journal; a context manager.

    Args:
        path: file to create.

    Raises:
        FileExistsError: the file is already there; a journal is never overwritten.
        OSError: it cannot be created or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seq = 0
        self._file: IO[bytes] = path.open("xb")

    def append(self, event: Event) -> None:
        """Write one record and force it to disk."""
        self._file.write(_encode(self._seq, event))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._seq += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_journal(path: Path) -> Iterator[Event]:
    """All records in order.

    Raises:
        JournalDamaged: a line does not verify; the message names it.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file):
            try:
                yield _decode(number, line)
            except (ValueError, KeyError, TypeError, ValidationError) as error:
                raise JournalDamaged(
                    f"{path}: line {number + 1} is damaged ({type(error).__name__}); nothing was read from there on"
                ) from error


def journal_sha256(path: Path) -> str:
    """Digest that a plan carries of its evidence."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _canonical(seq: int, name: str, payload: Any) -> str:
    return json.dumps({"seq": seq, "type": name, "payload": payload}, separators=(",", ":"), sort_keys=True)


def _encode(seq: int, event: Event) -> bytes:
    name = _NAMES[type(event)]
    payload = event.model_dump(mode="json")
    crc32 = zlib.crc32(_canonical(seq, name, payload).encode())
    line = {"seq": seq, "crc32": crc32, "type": name, "payload": payload}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _decode(number: int, line: bytes) -> Event:
    record = json.loads(line)
    if not line.endswith(b"\n") or record["seq"] != number:
        raise ValueError("out of order")
    canonical = _canonical(record["seq"], record["type"], record["payload"])
    if zlib.crc32(canonical.encode()) != record["crc32"]:
        raise ValueError("checksum")
    return cast("Event", EVENT_TYPES[record["type"]].model_validate(record["payload"]))
