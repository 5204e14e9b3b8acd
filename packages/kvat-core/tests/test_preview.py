"""A dry run says what a tune would try, loads no weights, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvat_core import DryRun, Limit, Limits, Profile, dry_run, lock, roofline
from kvat_core.errors import UsageError
from kvat_core.fake import FakeEngine
from kvat_core.preview import LOOSE_NOTE, NO_CEILINGS_NOTE
from kvat_core.schema import (
    CandidateEntry,
    Ceiling,
    Ceilings,
    Footprint,
    Header,
    LaunchOrder,
    ModelShape,
    PromptSource,
    Scenario,
)

Tell = Callable[..., None]
RATE = Ceiling(best=1e9, median=1e9)
WHOLE = {"attention_heads": 4, "hidden_size": 64, "vocab_size": 100, "parameters": 10**6, "step_parameters": 10**6}
WEIGHT_BYTES = 4 * 10**6
KEY = "8+3x1"


def foretold(one: Any, **changes: Any) -> DryRun:
    request = {**vars(one.request), **changes}
    return dry_run(type(one.request)(**request), open_worker=one.worker)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Tell:
    """Let the fake engine tell footprints, a static cache being as large as asked, and ceilings where it is asked."""
    describe = FakeEngine.describe

    def tell(cache_bytes: int = 0, static_tokens: int = 16) -> None:
        def whole(engine: FakeEngine, *arguments: Any) -> ModelShape:
            return describe(engine, *arguments).model_copy(update=WHOLE)

        def footprint(engine: FakeEngine, settings: Mapping[str, str], scenario: Scenario, *_: Any) -> Footprint:
            reserved = static_tokens if settings["cache"] == "static" else None
            sizes = {"element_bytes": 4, "kv_element_bytes": 4, "prefill_bytes": 50_000, "step_bytes": 10}
            return Footprint(dtype="float32", reserved_tokens=reserved, **sizes)

        def measure(engine: FakeEngine, *_: Any, **__: Any) -> Ceilings:
            rates = {"read_bytes_per_s": RATE, "copy_bytes_per_s": RATE, "launch_floor_s": RATE}
            return Ceilings(gemm_flop_per_s={"float32": RATE}, cache_bytes=cache_bytes, **rates)

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(FakeEngine, "describe", whole)
        monkeypatch.setattr(FakeEngine, "footprint", footprint)
        monkeypatch.setattr(FakeEngine, "ceilings", measure)

    return tell


# What is done for it


def test_a_worker_is_asked_for_machine_and_model_alone(command: Any, told: Tell) -> None:
    told()
    one, asked = command(), []

    class Recording(one.worker):  # type: ignore[name-defined,misc]
        def call(self, operation: Any, *arguments: Any) -> Any:
            asked.append(operation)
            return super().call(operation, *arguments)

    one.worker = Recording
    foretold(one)

    assert asked == ["start", "probe", "describe"]


def test_nothing_is_written(command: Any, told: Tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told()
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    profile = command().request.profile.model_copy(update={"prompt": PromptSource(kind="text", value="my own words")})

    found = foretold(command(profile=profile))

    assert not list(tmp_path.iterdir())
    assert "my own words" not in found.model_dump_json()


def test_a_directory_that_could_not_be_used_is_told_and_left_alone(command: Any) -> None:
    one = command()
    one.out.mkdir()
    (one.out / "mine.txt").write_text("mine")

    found = foretold(one)
    forced = foretold(one, force=True)

    assert [path.name for path in one.out.iterdir()] == ["mine.txt"]
    (note,) = set(found.notes) - set(forced.notes)
    assert note.startswith("the tune itself would be refused: ")
    assert "--force" in note


def test_another_run_may_hold_the_lock(command: Any) -> None:
    one = command()
    one.out.mkdir()
    with lock.locked(one.out / "journal.lock"):
        before = (one.out / "journal.lock").read_bytes()
        found = foretold(one)
        assert (one.out / "journal.lock").read_bytes() == before
    assert found.candidates


def test_a_run_to_go_on_with_is_refused(command: Any) -> None:
    with pytest.raises(UsageError, match="--resume"):
        foretold(command(), resume=True)


@pytest.mark.parametrize("changes", [{"model": "fake:none"}, {"search": "none"}, {"pinned": {"cache": "none"}}])
def test_what_a_tune_refuses_is_refused(command: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        foretold(command(), **changes)


# What it says


@pytest.mark.parametrize("space", ["safe", "full"])
def test_it_names_what_a_tune_tries_and_what_it_does_not(command: Any, space: str) -> None:
    found = foretold(command("dry", space=space))
    one = command("real", space=space)
    one.run()
    entries = [event for event in one.events() if isinstance(event, CandidateEntry)]

    assert [one.id for one in found.candidates] == [e.candidate.id for e in entries if e.exclusion is None]
    assert [one.incumbent for one in found.candidates] == [True, *[False] * (len(found.candidates) - 1)]
    told_of = {(label, group.reason) for group in found.excluded for label in group.labels}
    assert told_of == {(e.candidate.label, e.exclusion) for e in entries if e.exclusion is not None}
    assert len({group.reason for group in found.excluded}) == len(found.excluded) > 0


def test_who_shares_a_load_is_told(command: Any) -> None:
    found = foretold(command(space="full"))

    with_graph = {one.loads for one in found.candidates if one.settings["graph"] == "on"}
    without = {one.loads for one in found.candidates if one.settings["graph"] == "off"}
    assert (without, with_graph, found.loads) == ({(1,)}, {(2,)}, 2)


def test_the_launches_are_those_that_a_run_without_failures_takes(command: Any) -> None:
    one = command("real", search="grid")
    one.run()
    taken = sum(isinstance(event, LaunchOrder) for event in one.events())

    assert foretold(command("dry", search="grid")).launches == taken
    assert foretold(command("dry", search="grid", max_launches=2)).launches == 2 < taken


def test_an_engine_without_footprints_predicts_nothing(command: Any) -> None:
    found = foretold(command())

    assert {one.predicted_peak_bytes for one in found.candidates} == {None}
    assert found.one_call_each_s is None
    assert "engine fake predicts neither memory nor bounds" in found.notes


def test_without_ceilings_memory_is_predicted_and_time_is_not(command: Any, told: Tell) -> None:
    told()
    found = foretold(command())

    assert all((one.predicted_peak_bytes or 0) > WEIGHT_BYTES for one in found.candidates)
    assert not any(one.bounds for one in found.candidates)
    assert NO_CEILINGS_NOTE in found.notes


def test_ceilings_of_an_earlier_run_bound_every_candidate(command: Any, told: Tell) -> None:
    told()
    earlier = command("earlier")
    earlier.run()
    header, *rest = earlier.events()
    assert isinstance(header, Header)
    assert header.ceilings is not None
    entries = {event.candidate.id: event for event in rest if isinstance(event, CandidateEntry)}

    found = foretold(command())

    (scenario,) = header.profile.scenarios
    for one in found.candidates:
        footprint = entries[one.id].footprints[KEY]
        work = roofline.work(header.shape, footprint, scenario)
        assert work is not None
        assert roofline.bounds(work, footprint, header.ceilings, 1) == tuple(vars(one.bounds[KEY]).values())
        assert one.predicted_peak_bytes == entries[one.id].predicted_peak_bytes
    at_least = sum(one.bounds[KEY].ttft_s + 2 / one.bounds[KEY].decode_tps for one in found.candidates)
    assert found.one_call_each_s == pytest.approx(at_least)
    assert NO_CEILINGS_NOTE not in found.notes


def test_what_caches_may_serve_is_not_bounded(command: Any, told: Tell) -> None:
    told(cache_bytes=WEIGHT_BYTES)
    command("earlier").run()

    found = foretold(command())

    assert not any(one.bounds for one in found.candidates)
    assert LOOSE_NOTE in found.notes


def test_a_peak_above_its_limit_is_told_of_those_that_have_it(command: Any, told: Tell) -> None:
    told(static_tokens=2000)
    found = foretold(command(limits=Limits(max_host_bytes=WEIGHT_BYTES + 100_000)))

    missing = {one.label for one in found.candidates if one.misses}
    assert missing == {one.label for one in found.candidates if one.settings["cache"] == "static"}
    assert all("predicted" in miss for one in found.candidates for miss in one.misses)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_ttft_s": Limit(value=1e-6, percentile=1)}, "TTFT p1 ≤"),
        ({"max_tpot_s": Limit(value=1e-6)}, "TPOT p50 ≤"),
        ({"min_decode_tps": Limit(value=1e9)}, "decode rate p50 ≥"),
    ],
)
def test_a_limit_beyond_the_bounds_cannot_be_kept(
    command: Any, told: Tell, limits: dict[str, Limit], said: str
) -> None:
    told()
    command("earlier").run()

    found = foretold(command(limits=Limits(**limits)))

    assert all(len(one.misses) == 1 and one.misses[0].startswith(said) for one in found.candidates)
    assert not any(one.misses for one in foretold(command()).candidates)


def test_a_budget_below_one_call_of_each_is_told(command: Any, told: Tell) -> None:
    told()
    command("earlier").run()

    least_s = foretold(command()).one_call_each_s
    assert least_s is not None
    scarce, ample = (foretold(command(), budget_s=share * least_s) for share in (0.5, 2.0))

    assert len(set(scarce.notes) - set(ample.notes)) == 1


def test_limits_in_force_are_those_of_profile_and_request(command: Any) -> None:
    profile: Profile = command().request.profile
    limited = profile.model_copy(update={"limits": Limits(max_host_bytes=5 * 2**30)})
    found = foretold(command(profile=limited, limits=Limits(min_context_tokens=5)))

    assert found.profile.limits == Limits(max_host_bytes=5 * 2**30, min_context_tokens=5)
