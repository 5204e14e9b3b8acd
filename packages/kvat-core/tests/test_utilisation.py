"""From an engine's footprints and ceilings to what journal and plan say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvat_core.engine import EngineError
from kvat_core.errors import UsageError
from kvat_core.fake import FakeEngine
from kvat_core.schema import CandidateEntry, Ceiling, Ceilings, Footprint, Header, ModelShape, Plan, Scenario

Tell = Callable[..., None]
SLOW = Ceiling(best=1.0, median=1.0)
FAST = Ceiling(best=1e15, median=1e15)
WHOLE = {"attention_heads": 4, "hidden_size": 64, "vocab_size": 100, "parameters": 10**6, "step_parameters": 10**6}


def ceilings(read: Ceiling, gemm: Ceiling = FAST) -> Ceilings:
    fields = {"read_bytes_per_s": read, "copy_bytes_per_s": read, "launch_floor_s": SLOW}
    return Ceilings(threads=None, gemm_flop_per_s={"float32": gemm}, first_call_bytes=1000, **fields)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Tell:
    """Let the fake engine tell footprints and ceilings; static caches may be as large as asked."""
    describe = FakeEngine.describe

    def whole(engine: FakeEngine, *arguments: Any) -> ModelShape:
        return describe(engine, *arguments).model_copy(update=WHOLE)

    def tell(found: Ceilings | Exception, static_tokens: int = 16) -> None:
        def footprint(engine: FakeEngine, settings: Mapping[str, str], scenario: Scenario, *_: Any) -> Footprint:
            reserved = static_tokens if settings["cache"] == "static" else None
            sizes = {"element_bytes": 4, "kv_element_bytes": 4, "prefill_bytes": 50_000, "step_bytes": 10}
            return Footprint(dtype="float32", reserved_tokens=reserved, **sizes)

        def measure(engine: FakeEngine, *_: Any, **__: Any) -> Ceilings:
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(FakeEngine, "describe", whole)
        monkeypatch.setattr(FakeEngine, "footprint", footprint)
        monkeypatch.setattr(FakeEngine, "ceilings", measure)

    return tell


def parts(one: Any) -> tuple[Header, list[CandidateEntry]]:
    header, *rest = one.events()
    return header, [event for event in rest if isinstance(event, CandidateEntry)]


def uses(plan: Plan) -> list[float | None]:
    return [result.bandwidth_use for candidate in plan.candidates for result in candidate.scenarios]


def test_an_engine_without_footprints_is_asked_for_no_ceilings(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(FakeEngine, "ceilings", refuse)
    one = command()

    plan = one.run().plan

    header, entries = parts(one)
    assert header.ceilings is None
    assert not any(entry.footprints for entry in entries)
    assert set(uses(plan)) == {None}


def test_figures_are_held_against_the_ceilings_in_the_journal(command: Any, told: Tell) -> None:
    told(ceilings(FAST))
    one = command()

    plan = one.run().plan

    header, entries = parts(one)
    assert header.ceilings == ceilings(FAST)
    live = [entry for entry in entries if entry.exclusion is None]
    assert all(entry.footprints.keys() == {"8+3x1"} for entry in live)
    # Weights, prefill, a first call, and a cache of 8 positions, or of 16: two layers, 2 · 2 · 16 numbers of 4 bytes.
    assert {entry.predicted_peak_bytes for entry in live} == {4_051_000 + held * 2 * 64 * 4 for held in (8, 16)}
    result = plan.candidate(plan.winner.id).scenarios[0]
    # Two steps, in which a query sees 9 and 10 keys.
    read_bytes = 4_000_000 + 9.5 * 2 * 64 * 4
    assert result.bandwidth_use == pytest.approx(read_bytes * result.decode_tps.median / 1e15)
    assert result.flop_use is not None
    assert not any("byte model" in note for note in plan.notes)


def test_more_than_the_memory_delivers_is_called_a_wrong_model(command: Any, told: Tell) -> None:
    told(ceilings(SLOW))

    plan = command().run().plan

    assert any(note.startswith("the byte model is wrong") for note in plan.notes)
    assert not any(note.startswith("the model of operations is wrong") for note in plan.notes)


def test_more_than_the_units_can_multiply_is_called_a_wrong_model(command: Any, told: Tell) -> None:
    told(ceilings(FAST, gemm=SLOW))

    plan = command().run().plan

    assert any(note.startswith("the model of operations is wrong") for note in plan.notes)
    assert not any(note.startswith("the byte model is wrong") for note in plan.notes)


def test_what_no_memory_can_hold_is_not_tried_but_what_runs_today_is(command: Any, told: Tell) -> None:
    told(ceilings(FAST), static_tokens=10**13)
    one = command()

    one.run()

    _, entries = parts(one)
    excluded = [entry for entry in entries if entry.exclusion and "needs at least" in entry.exclusion]
    assert excluded
    assert all(entry.candidate.settings["cache"] == "static" for entry in excluded)
    today = command("today", incumbent={"cache": "static"})
    today.run()
    assert not next(entry for entry in parts(today)[1] if entry.incumbent).exclusion


def test_ceilings_that_cannot_be_measured_cost_no_run(command: Any, told: Tell) -> None:
    told(EngineError("error", "no such device"))

    plan = command().run().plan

    assert any("no such device" in note for note in plan.notes)
    assert set(uses(plan)) == {None}


@pytest.mark.parametrize("failure", [OSError, UsageError])
def test_why_they_cannot_be_measured_tells_no_path(command: Any, told: Tell, failure: type[Exception]) -> None:
    told(failure(f"cannot open {Path.home()}/secret/library.so"))
    one = command()

    plan = one.run().plan

    (note,) = (note for note in plan.notes if "can do at most is not known" in note)
    assert "library.so" in note
    assert "secret" not in note + one.journal.read_text()


def test_other_ceilings_are_no_other_run(command: Any, told: Tell) -> None:
    told(ceilings(FAST))
    one = command()
    one.stop(14)
    told(ceilings(SLOW))

    plan = one.resume().plan

    assert not plan.partial
    assert parts(one)[0].ceilings == ceilings(FAST)
