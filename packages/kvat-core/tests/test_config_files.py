"""Defaults in a model's directory: merged with what is there, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvat_core import config_change, discovery
from kvat_core.engine import ConfigFile
from kvat_core.errors import CannotWrite, UsageError
from kvat_core.fake import FakeEngine
from kvat_core.planner import make_plan
from kvat_core.run import Run
from kvat_core.schema import JournalRef, Plan

REF = JournalRef(file="journal.jsonl", sha256="0", samples=0)


class Engine(FakeEngine):
    """One that reads a file of defaults."""

    file = ConfigFile(name="defaults.json", values={"cache": "static"}, replaces=("cache", "slots"), lost=("a kernel",))

    def config_file(self, plan: Plan, folder: Path) -> ConfigFile | None:
        return self.file


@pytest.fixture
def plan(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(discovery, "load_engine", lambda name: Engine())
    return make_plan(make_run({"today": [1.0, 1.01, 0.99]}), REF)


def test_a_new_file_has_the_values(plan: Plan, tmp_path: Path) -> None:
    change = config_change(plan, tmp_path)
    assert not change.path.exists()
    change.write()
    assert json.loads((tmp_path / "defaults.json").read_text()) == {"cache": "static"}
    assert (change.changes, change.lost) == ((), ("a kernel",))


def test_what_the_engine_does_not_decide_is_kept(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "defaults.json"
    path.write_text(json.dumps({"end": [1, 2], "cache": "dynamic", "slots": 5}))
    change = config_change(plan, tmp_path)
    assert change.changes == ('cache was "dynamic", is "static"', "slots was 5, is taken out")
    change.write()
    assert json.loads(path.read_text()) == {"end": [1, 2], "cache": "static"}


@pytest.mark.parametrize(("text", "what"), [("{", "is not JSON"), ("[]", "is no JSON object"), ("\xff", "is not JSON")])
def test_a_file_that_cannot_be_merged_is_left_as_it_is(plan: Plan, tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "defaults.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=f"defaults.json {what} and is left as it is"):
        config_change(plan, tmp_path)
    assert path.read_text(encoding="latin-1") == text


def test_a_link_is_replaced_and_what_it_leads_to_is_not_touched(plan: Plan, tmp_path: Path) -> None:
    shared = tmp_path / "shared.json"
    shared.write_text('{"end": 1}')
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "defaults.json").symlink_to(shared)
    config_change(plan, folder).write()
    assert json.loads((folder / "defaults.json").read_text()) == {"end": 1, "cache": "static"}
    assert shared.read_text() == '{"end": 1}'


def test_a_directory_that_cannot_be_written_keeps_its_file(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "defaults.json"
    path.write_text("{}")
    change = config_change(plan, tmp_path)

    def no_room(self: Path, target: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_room)
    with pytest.raises(CannotWrite, match=r"defaults.json cannot be written \(No space left on device\)"):
        change.write()
    assert path.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_has_to_be_there(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no directory \S+none; name the directory of a model"):
        config_change(plan, tmp_path / "none")


NO_NAME = "x" * 5000
"""Longer than any system takes."""


def test_what_can_be_the_name_of_no_directory_is_none(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name the directory of a model"):
        config_change(plan, tmp_path / NO_NAME)


def test_a_file_that_cannot_be_looked_at_is_no_new_one(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "file", Engine.file.model_copy(update={"name": NO_NAME}))
    with pytest.raises(UsageError, match=r"^cannot read .*; mend that or move it away$"):
        config_change(plan, tmp_path)


def test_a_strange_name_is_refused(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "file", Engine.file.model_copy(update={"name": "../defaults.json"}))
    with pytest.raises(UsageError, match=r"names a file '\.\./defaults\.json', which is no plain name"):
        config_change(plan, tmp_path)


def test_an_engine_without_such_a_file_says_so(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "load_engine", lambda name: FakeEngine())
    with pytest.raises(UsageError, match="engine fake reads no file of defaults; apply its plan as code"):
        config_change(plan, tmp_path)
