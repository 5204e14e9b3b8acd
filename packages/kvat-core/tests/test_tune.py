"""Whole tunes: both faces of the fake engine, in real child processes, whatever a candidate does."""

from __future__ import annotations

import errno
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvat_core import Plan, Profile, Progress, TuneRequest, TuneResult, read_plan, tune
from kvat_core.engine import Probe
from kvat_core.errors import AllFailed, BudgetUsedUp, UsageError
from kvat_core.fake import FakeEngine
from kvat_core.journal import journal_sha256, read_journal
from kvat_core.measure.deadlines import Deadlines
from kvat_core.measure.supervisor import WorkerFailed
from kvat_core.planner import make_plan
from kvat_core.run import Run
from kvat_core.schema import CandidateResult, Failure, JournalRef, Objective, PromptSource, Sample, Scenario

OpenWorker = Callable[[Mapping[str, str]], Any]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def by_label(plan: Plan) -> dict[str, CandidateResult]:
    return {candidate.label: candidate for candidate in plan.candidates}


def tuned(out: Path, **request: Any) -> TuneResult:
    deadlines = Deadlines(first_token_s=3)
    return tune(TuneRequest(**{"out": out, "profile": "ci-micro", **request}), deadlines=deadlines)


@pytest.mark.parametrize(("model", "winner"), [("fake:tiny", "cache=static"), ("fake-server:tiny", "draft=ngram")])
def test_a_tune_finds_the_fastest_and_writes_all_files(out: Path, model: str, winner: str) -> None:
    result = tuned(out, model=model)
    plan = result.plan
    assert (plan.winner.label, plan.verdict) == (winner, "better")
    assert plan.ratio is not None
    assert plan.ratio.decode.value == pytest.approx(1.25, rel=0.02)
    assert {path.name for path in out.iterdir()} >= {"journal.jsonl", "best_plan.json", "snippet.py"}
    assert read_plan(out / "best_plan.json") == plan
    assert not psutil.Process().children(recursive=True)


def test_a_plan_is_a_function_of_its_journal(out: Path) -> None:
    plan = tuned(out, model="fake:tiny").plan
    run = Run.from_events(read_journal(out / "journal.jsonl"))
    ref = JournalRef(file="journal.jsonl", sha256=journal_sha256(out / "journal.jsonl"), samples=len(run.samples))
    assert make_plan(run, ref) == plan


def test_two_runs_of_the_same_command_measure_the_same_shapes_and_decide_alike(tmp_path: Path) -> None:
    one, other = (tuned(tmp_path / name, model="fake:tiny").plan for name in ("one", "other"))
    assert one.winner == other.winner
    assert one.candidates == other.candidates


def test_candidates_that_run_the_very_same_thing_are_measured_once(out: Path) -> None:
    plan = tuned(out, model="fake:tiny").plan
    aliases = {candidate.label: len(candidate.aliases) for candidate in plan.candidates}
    assert aliases["default"] == aliases["cache=static"] == 1
    samples = [event for event in read_journal(out / "journal.jsonl") if isinstance(event, Sample)]
    assert {sample.candidate for sample in samples} <= {candidate.id for candidate in plan.candidates}


def test_all_candidates_of_a_block_see_the_same_prompts_and_no_two_samples_do(
    out: Path, in_process_worker: Any
) -> None:
    nonces: dict[tuple[str, int], list[int]] = {}

    workers = itertools.count()

    class Recording(in_process_worker):
        def __init__(self, environment: Mapping[str, str]) -> None:
            super().__init__(environment)
            self.number = next(workers)

        def call(self, operation: Any, arguments: Any, phase: str, limits: Any) -> Any:
            if operation == "prepare":
                self.settings = json.dumps([arguments["setup"], arguments["arguments"]])
            if phase == "sample":
                nonces.setdefault((self.settings, self.number), []).append(arguments["prompt"]["nonce"])
            return super().call(operation, arguments, phase, limits)

    tune(TuneRequest(out=out, model="fake:tiny", profile="ci-micro", search="grid"), open_worker=Recording)
    blocks = {worker: [seen for (_, one), seen in nonces.items() if one == worker] for _, worker in nonces}
    assert len(blocks) == 3
    for candidates in blocks.values():
        assert len(candidates) == 4
        assert all(seen == candidates[0] for seen in candidates)
    drawn = [nonce for candidates in blocks.values() for nonce in candidates[0]]
    assert len(set(drawn)) == len(drawn) == 9


@pytest.mark.parametrize(
    ("operation", "answer"),
    [("decode", None), ("decode", {"clock": "sundial"}), ("prove", 7), ("resources", "much"), ("cleanup", None)],
)
def test_an_adapter_that_answers_nonsense_costs_no_run(
    out: Path, operation: str, answer: Any, in_process_worker: Any
) -> None:
    class Senseless(in_process_worker):
        suspect = False

        def call(self, asked: Any, arguments: Any, phase: str, limits: Any) -> Any:
            value = super().call(asked, arguments, phase, limits)
            if asked == "prepare":
                self.suspect = arguments["setup"]["kernel"] == "eager"
            if asked == "cleanup" == operation:
                raise WorkerFailed(Failure(kind="error", phase=phase, reason="at the very end"), alive=True)
            return answer if asked == operation and (self.suspect or operation == "resources") else value

    plan = tune(TuneRequest(out=out, model="fake:tiny", profile="ci-micro"), open_worker=Senseless).plan
    assert plan.winner.label == "cache=static"
    kinds = {candidate.failure.kind for candidate in plan.candidates if candidate.failure}
    assert kinds == ({"invalid_output"} if operation in ("decode", "prove") else set())


@pytest.mark.parametrize(
    ("behaviour", "kind", "phase"),
    [
        ("crash", "crash", "warm-up"),
        ("oom", "oom_device", "warm-up"),
        ("misapplied", "not_applied", "prove"),
        ("wrong-count", "invalid_output", "warm-up"),
        ("nan", "invalid_output", "warm-up"),
        ("secret", "error", "warm-up"),
        ("hang", "timeout", "first token"),
    ],
)
def test_one_bad_candidate_costs_one_candidate(out: Path, behaviour: str, kind: str, phase: str) -> None:
    plan = tuned(out, model=f"fake:{behaviour}").plan
    results = by_label(plan)
    failed = [candidate for candidate in plan.candidates if candidate.state == "failed"]
    assert [candidate.label for candidate in failed] == ["cache=static kernel=eager"]
    assert failed[0].failure is not None
    assert (failed[0].failure.kind, failed[0].failure.phase) == (kind, phase)
    assert (plan.winner.label, plan.verdict) == ("cache=static", "better")
    assert results["default"].score is not None
    assert results["default"].score.n >= 3
    assert not psutil.Process().children(recursive=True)


def test_an_engine_that_prints_disturbs_nothing(out: Path) -> None:
    assert tuned(out, model="fake:chatty").plan.winner.label == "cache=static"


def test_equal_candidates_keep_the_default(out: Path) -> None:
    plan = tuned(out, model="fake:flat").plan
    assert (plan.winner, plan.verdict) == (plan.incumbent, "tie")


def test_when_every_candidate_fails_the_journal_stays(out: Path) -> None:
    with pytest.raises(AllFailed, match=r"every candidate failed \(error\); .*out/journal.jsonl tells of each"):
        tuned(out, model="fake:all-fail")
    assert {path.name for path in out.iterdir()} == {"journal.jsonl"}
    assert list(read_journal(out / "journal.jsonl"))


SECRET = "my own words that nobody else may read"


@pytest.mark.parametrize("kind", ["text", "file"])
@pytest.mark.parametrize("behaviour", ["secret", "tiny"])
def test_a_users_prompt_is_in_no_file(out: Path, tmp_path: Path, kind: Any, behaviour: str) -> None:
    text = tmp_path / "private-folder" / "prompt.txt"
    text.parent.mkdir()
    text.write_text(SECRET)
    profile = Profile(
        name="own",
        scenarios=(Scenario(prompt_tokens=32, output_tokens=4),),
        objective=Objective(decode=1),
        prompt=PromptSource(kind=kind, value=SECRET if kind == "text" else str(text)),
    )
    tuned(out, model=f"fake:{behaviour}", profile=profile)
    written = "".join(path.read_text() for path in out.iterdir())
    assert "nobody else" not in written
    assert "private-folder" not in written


def test_the_snippet_runs_and_prints_the_plans_metrics(out: Path) -> None:
    plan = tuned(out, model="fake:tiny").plan
    done = subprocess.run([sys.executable, out / "snippet.py"], capture_output=True, text=True, check=True)
    fields = dict(pair.split("=") for pair in done.stdout.split())
    measured = by_label(plan)[plan.winner.label].scenarios[0]
    assert float(fields["decode_tps"]) == pytest.approx(measured.decode_tps.median, rel=0.05)
    assert float(fields["ttft_s"]) == pytest.approx(measured.ttft_s.median, rel=0.05)


def test_memory_of_winner_and_incumbent_is_read_in_processes_of_their_own(out: Path) -> None:
    results = by_label(tuned(out, model="fake:tiny").plan)
    assert results["default"].scenarios[0].peak_host_bytes
    assert results["cache=static"].scenarios[0].peak_host_bytes
    assert results["kernel=eager"].scenarios[0].peak_host_bytes is None


def test_unknown_memory_stays_unknown(out: Path) -> None:
    for candidate in tuned(out, model="fake-server:tiny").plan.candidates:
        assert all(scenario.peak_host_bytes is None for scenario in candidate.scenarios)


def test_settings_can_be_pinned_excluded_and_the_incumbent_chosen(out: Path) -> None:
    request = {"pinned": {"kernel": "eager"}, "excluded": (("cache", "static"),), "space": "default"}
    plan = tuned(out, model="fake:tiny", incumbent={"cache": "offloaded"}, **request).plan
    assert plan.incumbent.settings == {"cache": "offloaded", "kernel": "eager", "graph": "off"}
    assert plan.winner.settings == {"cache": "dynamic", "kernel": "eager", "graph": "off"}
    assert {c.settings["cache"] for c in plan.candidates if c.state == "excluded"} == {"static", "paged"}


def test_a_pinned_lossy_value_is_accepted(out: Path) -> None:
    plan = tuned(out, model="fake:tiny", space="full", pinned={"cache": "quantized"}).plan
    assert plan.winner.settings["cache"] == "quantized"


def test_a_lossy_candidate_is_measured_and_cannot_win(out: Path) -> None:
    plan = tuned(out, model="fake-server:tiny", space="full").plan
    lossy = [candidate for candidate in plan.candidates if candidate.fidelity.lossy and candidate.state == "ok"]
    assert lossy
    assert all("may change the output" in (candidate.reason or "") for candidate in lossy)


def test_a_snippet_for_which_there_is_no_room_is_told_apart_and_costs_no_plan(
    out: Path, monkeypatch: pytest.MonkeyPatch, in_process_worker: type
) -> None:
    mkstemp = tempfile.mkstemp

    def full(*, dir: Path, prefix: str) -> tuple[int, str]:
        if "snippet" in prefix:
            raise OSError(errno.ENOSPC, "No space left on device")
        return mkstemp(dir=dir, prefix=prefix)

    monkeypatch.setattr(tempfile, "mkstemp", full)
    result = tune(TuneRequest(out=out, model="fake:tiny"), open_worker=in_process_worker)
    assert read_plan(out / "best_plan.json") == result.plan
    assert "snippet.py cannot be written (No space left on device)" in str(result.unwritten)
    assert "--resume" in str(result.unwritten)
    assert not result.warnings


def test_a_snippet_in_a_strange_place_is_not_written(
    out: Path, monkeypatch: pytest.MonkeyPatch, in_process_worker: type
) -> None:
    monkeypatch.setattr(FakeEngine, "snippet", lambda self, plan: {"snippet.py": "", "../elsewhere.py": ""})
    result = tune(TuneRequest(out=out, model="fake:tiny"), open_worker=in_process_worker)
    assert "names a file '../elsewhere.py'" in result.warnings[0]
    assert not (out.parent / "elsewhere.py").exists()


def test_a_snippet_that_cannot_be_written_costs_no_plan(
    out: Path, monkeypatch: pytest.MonkeyPatch, in_process_worker: type
) -> None:
    def broken(self: FakeEngine, plan: Plan) -> dict[str, str]:
        raise KeyError("gone")

    monkeypatch.setattr(FakeEngine, "snippet", broken)
    result = tune(TuneRequest(out=out, model="fake:tiny", profile="ci-micro"), open_worker=in_process_worker)
    assert result.warnings == ("the snippet was not written: KeyError",)
    assert {path.name for path in result.files} == {"journal.jsonl", "best_plan.json", "report.md"} & {
        path.name for path in out.iterdir()
    }


def test_an_engine_that_cannot_be_asked_says_why(
    out: Path, monkeypatch: pytest.MonkeyPatch, in_process_worker: type
) -> None:
    def broken(self: FakeEngine, device: str | None, options: Mapping[str, str]) -> Probe:
        raise RuntimeError("the driver is\nnot loaded")

    monkeypatch.setattr(FakeEngine, "probe", broken)
    with pytest.raises(UsageError, match=r"probe: error, builtins.RuntimeError: the driver is not loaded\); mend its "):
        tune(TuneRequest(out=out, model="fake:tiny"), open_worker=in_process_worker)


@pytest.mark.parametrize(
    ("kind", "advice"),
    [("timeout", "with --deadline"), ("oom_host", "a smaller --model"), ("crash", "mend its installation")],
)
def test_an_end_while_the_machine_is_looked_at_says_what_to_do(
    out: Path, in_process_worker: Any, kind: Any, advice: str
) -> None:
    class Ending(in_process_worker):
        def call(self, asked: Any, arguments: Any, phase: str, limits: Any) -> Any:
            raise WorkerFailed(Failure(kind=kind, phase=phase, reason="it ended"), alive=False)

    with pytest.raises(UsageError, match=f"start: {kind}, it ended.*{advice}"):
        tune(TuneRequest(out=out, model="fake:tiny"), open_worker=Ending)
    assert not out.exists()


def test_an_engine_without_a_demonstration_needs_a_model(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "own_models", ())
    with pytest.raises(UsageError, match="engine fake has no demonstration model; name a --model"):
        tuned(out, engine="fake", model=None)


def test_what_nobody_chose_is_noted(out: Path, monkeypatch: pytest.MonkeyPatch, in_process_worker: type) -> None:
    def one_thread(self: FakeEngine, device: str | None, options: Mapping[str, str]) -> Probe:
        return Probe(device="cpu", threads=1, versions={})

    monkeypatch.setattr(FakeEngine, "probe", one_thread)
    monkeypatch.setattr("kvat_core.preparation.usable_cores", lambda: 8)
    plan = tune(TuneRequest(out=out, model="fake:tiny"), open_worker=in_process_worker).plan
    for part in ("no profile was named", "measuring with 1 of 8 cores", "the weights are random"):
        assert any(part in note for note in plan.notes)
    asked = TuneRequest(out=out.with_name("more"), model="fake:tiny", threads=9)
    crowded = tune(asked, open_worker=in_process_worker).plan
    assert any("measuring with 9 threads on 8 cores" in note for note in crowded.notes)


def test_progress_tells_what_is_done_and_what_is_left(out: Path) -> None:
    seen: list[Progress] = []
    tune(TuneRequest(out=out, model="fake:tiny", profile="ci-micro"), seen.append)
    left = [progress.launches_left for progress in seen if progress.launches_done]
    assert left == sorted(left, reverse=True)
    assert left[-1] <= 1
    assert any(progress.activity.startswith("timing ") for progress in seen)
    assert seen[-1].left_s is not None
    assert (seen[0].run, seen[0].activity) == (None, "looking at the machine and the model")
    begun = [progress for progress in seen if progress.run is not None and not progress.launches_done]
    assert begun
    assert all(progress.launches_left > 0 for progress in begun)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"engine": "none"}, "no engine is called 'none'"),
        ({"model": "fake:none"}, "has no model"),
        ({"engine": "fake", "model": ""}, "--model is empty"),
        ({"engine": "fake", "model": "x" * 300}, "has no model"),
        ({"model": "fake:tiny", "profile": ""}, "unknown profile ''"),
        ({"model": "fake:tiny", "revision": "main"}, "fake:tiny has no revisions; leave --revision out"),
        ({"model": "fake:tiny", "device": "cuda"}, "has no device 'cuda'"),
        ({"model": "fake:tiny", "profile": "none"}, "unknown profile"),
        ({"model": "fake:tiny", "contexts": (4096,)}, "exceed the model's 4096"),
        ({"model": "fake:tiny", "pinned": {"x": "y"}}, "unknown knob 'x'"),
    ],
)
def test_unusable_input_touches_nothing(out: Path, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        tuned(out, **request_)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_an_existing_run_is_refused_and_moved_aside_only_by_force(out: Path) -> None:
    tuned(out, model="fake:tiny")
    before = (out / "journal.jsonl").read_bytes()
    with pytest.raises(UsageError, match="is not empty"):
        tuned(out, model="fake:tiny")
    assert (out / "journal.jsonl").read_bytes() == before
    tuned(out, model="fake:tiny", force=True)
    assert (out.with_name("out.1") / "journal.jsonl").read_bytes() == before


def test_a_link_goes_on_leading_where_it_led(tmp_path: Path, in_process_worker: type) -> None:
    link, place = tmp_path / "link", tmp_path / "elsewhere" / "place"
    place.parent.mkdir()
    link.symlink_to(place)
    for number in range(2):
        request = TuneRequest(out=link, model="fake:tiny", seed=number, force=True)
        tune(request, open_worker=in_process_worker)
    assert link.readlink() == place
    assert read_plan(place / "best_plan.json")
    assert read_plan(place.with_name("place.1") / "best_plan.json")


def test_an_out_that_cannot_be_used_is_refused_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "below"):
        with pytest.raises(UsageError, match="--out"):
            tuned(out, model="fake:tiny")
    assert file.read_text() == "kept"


def test_without_out_the_directory_is_named_after_model_and_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = tuned(None, model="fake:tiny")  # type: ignore[arg-type]
    assert result.out == Path("kvat-out/fake-tiny-ci-micro")
    assert (tmp_path / result.out / "best_plan.json").is_file()


def test_the_plan_is_published_format_1(out: Path) -> None:
    tuned(out, model="fake:tiny")
    data = json.loads((out / "best_plan.json").read_text())
    assert data["format"] == 1
    for key in ("kvat", "created", "engine", "model", "machine", "profile", "incumbent", "winner", "verdict", "ratio"):
        assert key in data
    for key in ("confidence", "equivalents", "max_context", "metrics", "rules", "candidates", "journal"):
        assert key in data
    assert set(data["ratio"]["score"]) >= {"value", "low", "high"}
    assert set(data["candidates"][0]["scenarios"][0]["ttft_s"]) == {"median", "low", "high", "n"}


def test_no_more_time_is_said_to_be_left_than_the_budget_has(out: Path) -> None:
    seen: list[Progress] = []
    free: list[Progress] = []
    tune(TuneRequest(out=out.with_name("free"), model="fake:tiny", profile="ci-micro"), free.append)
    first = next(progress for progress in free if progress.left_s is not None)
    budget_s = first.elapsed_s + (first.left_s or 0.0) / 4
    with suppress(BudgetUsedUp):
        tune(TuneRequest(out=out, model="fake:tiny", profile="ci-micro", budget_s=budget_s), seen.append)
    told = [(progress.left_s, progress.elapsed_s) for progress in seen if progress.left_s is not None]
    assert all(left_s <= max(0.0, budget_s - elapsed_s) for left_s, elapsed_s in told)
