"""The journal gives back what was written, or says which line is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvat_core.errors import JournalDamaged
from kvat_core.journal import create_journal, read_journal
from kvat_core.run import Run
from kvat_core.schema import Event

MakeRun = Callable[..., Run]


def write(path: Path, run: Run) -> list[Event]:
    events: list[Event] = [run.header, *run.candidates, *run.proofs, *run.samples]
    with create_journal(path) as journal:
        for event in events:
            journal.append(event)
    return events


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    return make_run({"today": [1.0, 1.1], "other": [0.5, 0.25]})


def test_everything_written_is_read_again(tmp_path: Path, run: Run) -> None:
    events = write(tmp_path / "journal.jsonl", run)
    assert list(read_journal(tmp_path / "journal.jsonl")) == events


def test_every_record_is_on_disk_at_once(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "journal.jsonl"
    with create_journal(path) as journal:
        journal.append(run.header)
        assert list(read_journal(path)) == [run.header]


def test_a_journal_is_never_overwritten(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text("what was there")
    with pytest.raises(FileExistsError):
        create_journal(path)
    assert path.read_text() == "what was there"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_found_with_its_line(tmp_path: Path, run: Run, data: st.DataObject) -> None:
    path = tmp_path / "journal.jsonl"
    path.unlink(missing_ok=True)
    write(path, run)
    good = path.read_bytes()
    # The last line end apart: without it the last record is a torn one.
    position = data.draw(st.integers(0, len(good) - 2))
    replacement = data.draw(st.integers(0, 255).filter(lambda byte: byte != good[position]))
    path.write_bytes(good[:position] + bytes([replacement]) + good[position + 1 :])
    line = good[:position].count(b"\n") + 1
    with pytest.raises(JournalDamaged, match=f"line {line} is damaged"):
        list(read_journal(path))


def test_a_missing_line_is_found(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, run)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(JournalDamaged, match="line 3 is damaged"):
        list(read_journal(path))
