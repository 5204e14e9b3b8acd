from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvat_core import Profile, discovery, load_profile, noise, presets
from kvat_core.discovery import EngineStatus
from kvat_core.engine import ConfigFile
from kvat_core.fake import FakeEngine
from kvat_core.schema import EVENT_TYPES

Run = Callable[..., Any]


def test_apply_prints_the_snippet_of_the_run(kvat: Run, tuned: Path) -> None:
    outcome = kvat("apply", "--plan", tuned / "best_plan.json", "--print-snippet")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == (tuned / "snippet.py").read_text(encoding="utf-8")


def test_apply_writes_a_new_file_and_never_over_one(kvat: Run, tuned: Path, tmp_path: Path) -> None:
    target = tmp_path / "serve.py"
    words = ("apply", "--plan", tuned / "best_plan.json", "--write", target)
    assert kvat(*words).out == f"wrote {target}\n"
    assert target.read_text(encoding="utf-8") == (tuned / "snippet.py").read_text(encoding="utf-8")
    target.write_text("mine", encoding="utf-8")
    refused = kvat(*words)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == f"kvat: error: {target} exists and is left as it is; name a new file with --write\n"
    assert target.read_text(encoding="utf-8") == "mine"


def test_apply_says_why_it_cannot_write(kvat: Run, tuned: Path, tmp_path: Path) -> None:
    target = tmp_path / "none" / "serve.py"
    refused = kvat("apply", "--plan", tuned / "best_plan.json", "--write", target)
    assert refused.code == 2
    assert refused.err.startswith(f"kvat: error: cannot write {target}: No such file or directory")


def test_apply_has_no_defaults_of_an_engine_that_reads_none(kvat: Run, tuned: Path, tmp_path: Path) -> None:
    refused = kvat("apply", "--plan", tuned / "best_plan.json", "--generation-config", tmp_path, "--partial")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "kvat: error: engine fake reads no file of defaults; apply its plan as code\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def with_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the engine read a file of defaults, in which not everything has a place."""
    values = ConfigFile(name="defaults.json", values={"a": 1}, lost=("b=2, for loading", "c()"), left=("d stays",))
    monkeypatch.setattr(FakeEngine, "config_file", lambda self, plan, folder: values)


@pytest.mark.usefixtures("with_defaults")
def test_apply_writes_no_defaults_that_are_not_the_whole_winner(kvat: Run, tuned: Path, tmp_path: Path) -> None:
    refused = kvat("apply", "--plan", tuned / "best_plan.json", "--generation-config", tmp_path)
    assert refused.code == 2
    assert refused.out == "does not fit defaults.json: b=2, for loading\ndoes not fit defaults.json: c()\n"
    assert refused.err.startswith("kvat: error: the winner does not fit defaults.json as a whole, nothing was written;")
    assert refused.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("with_defaults")
def test_apply_writes_a_part_if_told_so_and_still_lists_the_rest(kvat: Run, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "defaults.json").write_text('{"a": 0, "mine": true}')
    outcome = kvat("apply", "--plan", tuned / "best_plan.json", "--generation-config", tmp_path, "--partial")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [
        "does not fit defaults.json: b=2, for loading",
        "does not fit defaults.json: c()",
        "a was 0, is 1",
        "d stays",
        f"wrote {tmp_path / 'defaults.json'}",
    ]
    assert json.loads((tmp_path / "defaults.json").read_text()) == {"a": 1, "mine": True}


def test_profiles_lists_every_preset(kvat: Run) -> None:
    lines = kvat("profiles").out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", *presets()]
    assert "128+32x1 (100 %)" in next(line for line in lines if line.startswith("ci-micro"))


def test_a_printed_profile_can_be_used(kvat: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(kvat("profiles", "rag").out, encoding="utf-8")
    assert load_profile(str(file)) == presets()["rag"]


def test_engines_lists_what_works(kvat: Run) -> None:
    outcome = kvat("engines")
    assert outcome.code == 0
    rows = [line.split() for line in outcome.out.splitlines()]
    assert ["fake", "kvat-core", "0.1.0", "ok"] in rows


@pytest.fixture
def broken_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution on the path whose engine cannot be imported."""
    info = tmp_path / "kvat_engine_broken-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvat-engine-broken\nVersion: 1.2\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[kvat.engines]\nbroken = none_such_module:Engine\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    discovery._registrations.cache_clear()
    yield
    discovery._registrations.cache_clear()


@pytest.mark.usefixtures("broken_distribution")
def test_engines_names_a_broken_one_with_its_package_and_the_cause(kvat: Run) -> None:
    outcome = kvat("engines")
    assert (outcome.code, outcome.err) == (0, "")
    line = next(line for line in outcome.out.splitlines() if line.startswith("broken"))
    assert line.split(maxsplit=4)[:4] == ["broken", "kvat-engine-broken", "1.2", "broken"]
    assert "none_such_module" in line


def test_engines_shows_foreign_text_on_one_line(kvat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status = EngineStatus("new", "kvat-engine-new", "9", "too_new", "two\nlines \x1b[31m")
    monkeypatch.setattr(discovery, "engine_statuses", lambda: [status])
    assert kvat("engines").out.splitlines()[1:] == ["new   kvat-engine-new  9        too new  two lines [31m"]


def test_doctor_shows_machine_findings_and_engines(kvat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "standing_findings", lambda: ["the room is loud: close the door"])
    monkeypatch.setattr(noise, "tried_findings", lambda: ["two talk at once: send one out"])
    lines = kvat("doctor").out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["CPU", "memory"]
    assert "- the room is loud: close the door" in lines
    assert "- two talk at once: send one out" in lines
    assert any(line.startswith("fake ") for line in lines[lines.index("Engines:") :])


def test_doctor_on_a_quiet_machine(kvat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "standing_findings", list)
    monkeypatch.setattr(noise, "tried_findings", list)
    assert "Noise: nothing found that disturbs measurements" in kvat("doctor").out


def test_schema_of_the_plan_has_the_keys_of_a_plan(kvat: Run, tuned: Path) -> None:
    schema = json.loads(kvat("schema", "plan").out)
    plan = json.loads((tuned / "best_plan.json").read_text(encoding="utf-8"))
    assert set(schema["required"]) <= set(schema["properties"]) == set(plan)
    assert set(schema["$defs"]["Machine"]["properties"]) == set(plan["machine"])


def test_schema_of_a_profile_asks_only_for_what_has_no_default(kvat: Run) -> None:
    schema = json.loads(kvat("schema", "profile").out)
    assert set(schema["required"]) == {"name", "scenarios", "objective"}
    assert set(schema["properties"]) == set(Profile.model_fields)


def test_schema_of_the_journal_has_an_envelope_per_record_type(kvat: Run, tuned: Path) -> None:
    schema = json.loads(kvat("schema", "journal").out)
    envelopes = {variant["properties"]["type"]["const"]: variant for variant in schema["oneOf"]}
    assert set(envelopes) == set(EVENT_TYPES)
    for line in (tuned / "journal.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        envelope = envelopes[record["type"]]
        assert set(record) == set(envelope["required"]) == set(envelope["properties"])
        payload = schema["$defs"][envelope["properties"]["payload"]["$ref"].rsplit("/", 1)[1]]
        assert set(record["payload"]) == set(payload["properties"])
