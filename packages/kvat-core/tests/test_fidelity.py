"""Fast but wrong does not win: what is judged, when, by which figures, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvat_core import Profile, Progress, TuneRequest, decide_again, likeness, tune
from kvat_core.costs import spent_launches
from kvat_core.engine import Answer, EngineError
from kvat_core.errors import AllFailed
from kvat_core.fake import FakeEngine
from kvat_core.journal import read_journal
from kvat_core.run import Run
from kvat_core.schema import CandidateResult, Failed, Likeness, Limits, Objective, Rounding, Scenario
from kvat_core.tuner import TuneResult

VOCABULARY = 8
logits = arrays(np.float64, (2, 5, VOCABULARY), elements=st.floats(-20, 20))


def predicted(values: Any) -> Any:
    shifted = values - values.max(axis=-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)


# How alike two ways to compute are ----------------------------------------------------------------


@given(logits)
def test_nothing_is_lost_between_equals(values: Any) -> None:
    same = likeness.compare(predicted(values), predicted(values), None)
    assert same == Likeness(
        steps=10, kl_nats=0.0, kl_max_nats=0.0, top1_agreement=1.0, first_divergence=None, first_clear_divergence=None
    )


@given(logits, logits)
def test_a_divergence_is_never_negative_and_agrees_with_its_definition(values: Any, others: Any) -> None:
    one, other = predicted(values).astype(np.float64), predicted(others).astype(np.float64)
    found = likeness.compare(predicted(values), predicted(others), None)
    by_hand = np.maximum(0.0, (np.exp(one) * (one - other)).sum(axis=-1))
    assert found.kl_nats == pytest.approx(by_hand.mean(), rel=1e-6)
    assert 0 <= found.kl_nats <= found.kl_max_nats
    assert found.top1_agreement == pytest.approx((one.argmax(-1) == other.argmax(-1)).mean())


def test_a_first_choice_that_was_nearly_a_tie_is_no_clear_divergence() -> None:
    reference = np.log(np.array([[[0.4, 0.4 - 1e-6, 0.2], [0.7, 0.2, 0.1]]], dtype=np.float32))
    swapped = np.log(np.array([[[0.4 - 1e-6, 0.4, 0.2], [0.7, 0.2, 0.1]]], dtype=np.float32))
    noise = Rounding(choice_nats=2e-6, kl_nats=0.0)
    found = likeness.compare(reference, swapped, noise)
    assert (found.first_divergence, found.first_clear_divergence) == (0, None)
    assert likeness.compare(reference, swapped, None).first_clear_divergence == 0
    other = np.log(np.array([[[0.4, 0.4 - 1e-6, 0.2], [0.2, 0.7, 0.1]]], dtype=np.float32))
    assert likeness.compare(reference, other, noise).first_clear_divergence == 1


@pytest.mark.parametrize("spoiled", [np.full((1, 2, 3), np.nan, np.float32), np.zeros((1, 3, 3), np.float32)])
def test_what_is_no_prediction_is_refused(spoiled: Any) -> None:
    with pytest.raises(ValueError, match="log-probabilities"):
        likeness.compare(np.zeros((1, 2, 3), np.float32), spoiled, None)


# A run --------------------------------------------------------------------------------------------


def tuned(out: Path, worker: type, **request: Any) -> TuneResult:
    return tune(TuneRequest(out=out, **request), open_worker=worker)


def events(out: Path) -> Run:
    return Run.from_events(read_journal(out / "journal.jsonl"))


def is_alias(one: CandidateResult) -> bool:
    return "runs the very same thing" in (one.reason or "")


def test_the_winner_is_judged_and_gets_its_canary(tmp_path: Path, in_process_worker: type) -> None:
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:trained").plan
    winner = plan.candidate(plan.require_winner().id)
    assert winner.settings["cache"] == "static"
    assert winner.fidelity.verdict == "exact"
    assert winner.fidelity.tokens == 256
    assert plan.canary == "clean"
    purposes = [order.purpose for order in events(tmp_path / "out").launches]
    assert purposes.count("canary") == 1
    assert purposes[-1] == "canary"


def test_what_is_wrong_fails_and_the_next_best_is_vetted_in_its_place(tmp_path: Path, in_process_worker: type) -> None:
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:wrong-output").plan
    broken = [one for one in plan.candidates if one.failure is not None]
    assert {one.failure.kind for one in broken if one.failure} == {"wrong_output"}
    assert all(one.settings["cache"] == "static" for one in broken)
    assert all("the first clearly other choice at token" in one.failure.reason for one in broken if one.failure)
    winner = plan.candidate(plan.require_winner().id)
    assert winner.state == "ok"
    assert winner.fidelity.verdict == "exact"


def test_what_leaks_fails_and_the_next_best_is_vetted_in_its_place(tmp_path: Path, in_process_worker: type) -> None:
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:leak").plan
    failures = {one.failure.reason: one.failure.kind for one in plan.candidates if one.failure is not None}
    assert failures == {"a request is answered differently after a longer and after a shorter one": "leak"}
    assert plan.candidate(plan.require_winner().id).state == "ok"
    assert plan.canary == "clean"


def test_nobody_is_left_where_all_are_wrong(tmp_path: Path, in_process_worker: type) -> None:
    pinned = {"cache": "static", "kernel": "flash"}
    with pytest.raises(AllFailed, match="wrong_output"):
        tuned(tmp_path / "out", in_process_worker, model="fake:wrong-output", pinned=pinned, space="safe")


def test_what_loses_output_may_win_only_within_the_limits(tmp_path: Path, in_process_worker: type) -> None:
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:trained", space="full").plan
    quantised = {one.settings["kernel"]: one for one in plan.candidates if one.settings["cache"] == "quantized"}
    close, lossy = quantised["auto"], quantised["eager"]
    assert close.fidelity.verdict == "close"
    assert close.eligible
    assert close.fidelity.kl_nats is not None
    assert 0 < close.fidelity.kl_nats < 0.01
    assert lossy.fidelity.verdict == "lossy"
    assert "; --allow-lossy accepts that" in (lossy.reason or "")
    for limits, eligible in (
        (Limits(allow_lossy=True), {"auto", "eager"}),
        (Limits(max_kl_nats=close.fidelity.kl_nats / 2), set()),
    ):
        again = decide_again(tmp_path / "out" / "journal.jsonl", None, limits)
        kinds = {one.settings["kernel"]: one for one in again.candidates if one.settings["cache"] == "quantized"}
        assert {kernel for kernel, one in kinds.items() if one.eligible} - {"flash"} == eligible


def test_what_may_lose_output_is_judged_before_it_is_raced(tmp_path: Path, in_process_worker: type) -> None:
    tuned(tmp_path / "out", in_process_worker, model="fake:trained", space="full")
    run = events(tmp_path / "out")
    lossy = {entry.candidate.id for entry in run.candidates if entry.candidate.lossy and entry.exclusion is None}
    judged: set[str] = set()
    for order in run.launches:
        names = {cell.candidate for cell in order.cells}
        if order.purpose == "fidelity":
            judged |= names
        if order.purpose in ("timing", "run_off"):
            assert names & lossy <= judged
    assert lossy <= judged


def test_a_judgement_that_fails_costs_no_figures_and_is_told(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvat_core import fake

    def run_out(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(fake._InProcessAdapter, "score", run_out)
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:trained", space="full").plan
    winner = plan.candidate(plan.require_winner().id)
    assert winner.fidelity.verdict is None
    assert winner.settings["cache"] == "static"
    assert any("was not held against its reference: oom_host" in note for note in plan.notes)
    lossy = [one for one in plan.candidates if one.fidelity.lossy and one.state == "ok"]
    assert lossy
    assert not any(one.eligible for one in lossy)


def test_two_fresh_processes_that_differ_are_no_leak(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvat_core import fake

    answers = iter(range(100))
    monkeypatch.setattr(fake._InProcessAdapter, "answer", lambda *_, **__: Answer(tokens=str(next(answers))))
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:trained").plan
    assert plan.canary == "undetermined"
    assert any("two fresh processes answer the same request differently" in note for note in plan.notes)


def test_predictions_that_differ_from_process_to_process_leave_it_to_the_tokens(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvat_core import fake

    rounded = iter(range(100))

    def answer(*_: Any, **__: Any) -> Answer:
        return Answer(tokens="ever the same", predictions=str(next(rounded)))

    monkeypatch.setattr(fake._InProcessAdapter, "answer", answer)
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:trained").plan
    assert plan.canary == "clean"
    assert any("predictions differ from process to process" in note for note in plan.notes)


def test_random_weights_make_nothing_lossy_eligible(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = {"cache": "dynamic", "kernel": "auto", "graph": "off"}
    monkeypatch.setattr(FakeEngine, "reference", lambda self, settings, incumbent, shape: reference)
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:tiny", space="full").plan
    lossy = [one for one in plan.candidates if one.fidelity.lossy and one.state == "ok"]
    assert lossy
    assert all("which random weights cannot tell" in (one.reason or "") for one in lossy if not is_alias(one))
    assert all(one.fidelity.verdict is None for one in lossy), "nothing is spent on what cannot be told"
    assert plan.candidate(plan.require_winner().id).fidelity.verdict == "exact"
    again = decide_again(tmp_path / "out" / "journal.jsonl", None, Limits(allow_lossy=True))
    assert any(one.eligible for one in again.candidates if one.fidelity.lossy)


@pytest.mark.parametrize("most", [20, 30])
def test_some_of_what_a_run_may_take_is_kept_for_vetting_its_winner(
    tmp_path: Path, in_process_worker: type, most: int
) -> None:
    profile = Profile(
        name="long",
        scenarios=(Scenario(prompt_tokens=32, output_tokens=8),),
        objective=Objective(ttft=1, decode=1),
        launches=50,
        samples=1,
    )
    result = tuned(tmp_path / "out", in_process_worker, model="fake:trained", profile=profile, max_launches=most)
    assert result.plan.partial
    assert result.plan.canary == "clean"
    winner = result.plan.candidate(result.plan.require_winner().id)
    assert winner.fidelity.verdict == "exact"
    assert spent_launches(events(tmp_path / "out")) <= most


def cut_after(out: Path, last: type) -> Path:
    """The journal of a run up to the first record of a kind, as somebody who was killed leaves it."""
    journal = out / "journal.jsonl"
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    kinds = [type(event) for event in read_journal(journal)]
    journal.write_text("".join(lines[: kinds.index(last) + 1]), encoding="utf-8")
    for other in ("best_plan.json", "report.md", "snippet.py"):
        (out / other).unlink(missing_ok=True)
    return out


@pytest.mark.parametrize("model", ["fake:wrong-output", "fake:leak"])
def test_who_is_killed_right_after_a_verdict_has_let_nobody_off(
    tmp_path: Path, in_process_worker: type, model: str
) -> None:
    whole = tuned(tmp_path / "out", in_process_worker, model=model).plan
    cut_after(tmp_path / "out", Failed)
    resumed = tuned(tmp_path / "out", in_process_worker, model=model, resume=True).plan
    assert resumed.winner == whole.winner
    assert [one.failure for one in resumed.candidates] == [one.failure for one in whole.candidates]


def test_what_predicts_no_numbers_is_wrong(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvat_core import fake

    sound = fake._InProcessAdapter._predict

    def predict(self: Any, tokens: Any, prompt_tokens: int) -> Any:
        found = sound(self, tokens, prompt_tokens)
        return found * np.nan if self._running["cache"] == "static" else found

    monkeypatch.setattr(fake._InProcessAdapter, "_predict", predict)
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:trained").plan
    failures = {one.failure.kind: one for one in plan.candidates if one.failure is not None}
    assert set(failures) == {"wrong_output"}
    assert failures["wrong_output"].settings["cache"] == "static"
    assert plan.require_winner().settings["cache"] != "static"


def test_what_ended_a_judgement_from_outside_does_so_once(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvat_core import fake

    sound, calls = fake._InProcessAdapter.score, iter(range(1000))

    def score(self: Any, *arguments: Any) -> Any:
        if next(calls) == 0:
            raise RuntimeError("a passing trouble")
        return sound(self, *arguments)

    monkeypatch.setattr(fake._InProcessAdapter, "score", score)
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:trained").plan
    winner = plan.candidate(plan.require_winner().id)
    assert winner.fidelity.verdict == "exact"
    assert [one.failure is None for one in events(tmp_path / "out").judged][:2] == [False, True]


def test_an_answer_that_depends_on_lengths_alone_is_no_leak(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvat_core import fake

    def answer(self: Any, prompt: Any, max_new_tokens: int, longest_tokens: int) -> Answer:
        self._longest = max(self._longest, prompt.tokens)
        return Answer(tokens=f"{prompt.tokens} {self._longest}")

    monkeypatch.setattr(fake._InProcessAdapter, "answer", answer)
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:trained").plan
    assert plan.canary == "clean"
    (found,) = events(tmp_path / "out").looked_for_leaks
    assert "depends on the lengths" in found.reason
    assert any("depends on the lengths" in note for note in plan.notes)


def test_what_is_left_of_the_text_of_a_request_is_a_leak(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvat_core import fake

    def answer(self: Any, prompt: Any, max_new_tokens: int, longest_tokens: int) -> Answer:
        left, self._latest = self._latest, prompt.texts[0].split()[-1]
        return Answer(tokens="ever the same", predictions=f"{prompt.nonce} {left}")

    monkeypatch.setattr(fake._InProcessAdapter, "answer", answer)
    with pytest.raises(AllFailed, match="leak"):
        tuned(tmp_path / "out", in_process_worker, model="fake:trained")


def test_who_runs_the_very_same_thing_leaks_as_well(tmp_path: Path, in_process_worker: type) -> None:
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:leak").plan
    leaking = [one.label for one in plan.candidates if one.failure is not None]
    assert len(leaking) > 1
    found = [one.verdict for one in events(tmp_path / "out").looked_for_leaks]
    assert found.count("leak") == 1


def test_who_would_stand_in_for_the_winner_is_judged_as_well(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvat_core import fake

    request = {
        "space": "full",
        "incumbent": {"cache": "offloaded", "kernel": "eager"},
        "excluded": (("cache", "dynamic"), ("cache", "quantized")),
    }
    shown: list[Progress] = []
    asked = TuneRequest(out=tmp_path / "sound", model="fake:trained", **request)
    sound = tune(asked, shown.append, open_worker=in_process_worker).plan
    assert sum(order.purpose == "fidelity" for order in events(tmp_path / "sound").launches) > 1
    assert all(progress.launches_left > 0 for progress in shown if progress.activity.startswith("judging"))
    (rule,) = [rule for rule in sound.rules if rule.when.feature_missing == "cache=static"]
    stand_in = sound.candidate(rule.use)
    assert stand_in.fidelity.verdict == "exact"
    forgetful = ("offloaded", "auto"), ("offloaded", "flash")
    monkeypatch.setattr(
        fake._InProcessAdapter,
        "_is_best",
        lambda self: (self._running["cache"], self._running["kernel"]) in forgetful,
    )
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:wrong-output", **request).plan
    assert plan.winner == sound.winner
    assert (failure := plan.candidate(stand_in.id).failure) is not None
    assert failure.kind == "wrong_output"
    assert stand_in.id not in [rule.use for rule in plan.rules]


# Precision ----------------------------------------------------------------------------------------


FULL = {"cache": "dynamic", "kernel": "auto", "graph": "off"}


@pytest.fixture
def precise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines whose quantised caches are references of their own, as less precise dtypes are."""

    def reference(self: Any, settings: Any, incumbent: Any, shape: Any) -> dict[str, str]:
        return {**FULL, "cache": "quantized"} if settings["cache"] == "quantized" else FULL

    monkeypatch.setattr(FakeEngine, "reference", reference)
    monkeypatch.setattr(FakeEngine, "in_full_precision", lambda self, settings, shape: FULL)


def quantised(run: Run) -> list[str]:
    return [name for name in run.fidelity if run.entry(name).candidate.settings["cache"] == "quantized"]


@pytest.mark.usefixtures("precise")
def test_no_precision_passes_without_a_look_at_full_precision(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvat_core import fake

    sound, troubles = fake._InProcessAdapter.score, iter([True])

    def score(self: Any, *arguments: Any) -> Any:
        if self._running["cache"] == "dynamic" and self._running["kernel"] == "auto" and next(troubles, False):
            raise RuntimeError("a passing trouble")
        return sound(self, *arguments)

    monkeypatch.setattr(fake._InProcessAdapter, "score", score)
    tuned(tmp_path / "out", in_process_worker, model="fake:trained", space="full", seed=1)
    run = events(tmp_path / "out")
    assert len(quantised(run)) > 1
    assert all(run.fidelity[name].full_precision is not None for name in quantised(run))


@pytest.mark.usefixtures("precise")
def test_nothing_is_exact_that_could_not_be_held_against_full_precision(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {**FULL, "kernel": "nowhere"}
    sound = FakeEngine.check
    monkeypatch.setattr(FakeEngine, "in_full_precision", lambda self, settings, shape: missing)
    monkeypatch.setattr(
        FakeEngine,
        "check",
        lambda self, settings, *seen: "too large" if settings == missing else sound(self, settings, *seen),
    )
    limits = Limits(allow_lossy=True)
    tuned(tmp_path / "out", in_process_worker, model="fake:trained", space="full")
    plan = decide_again(tmp_path / "out" / "journal.jsonl", None, limits)
    verdicts = {plan.candidate(name).fidelity.verdict for name in quantised(events(tmp_path / "out"))}
    assert verdicts
    assert "exact" not in verdicts
    strict = decide_again(tmp_path / "out" / "journal.jsonl", None, None)
    assert not any(one.eligible for one in strict.candidates if one.settings["cache"] == "quantized")


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines in which the faster kernels lose much of a quantised cache, and eager nearly nothing."""
    from kvat_core import fake

    sound = fake._InProcessAdapter._predict

    def predict(self: Any, tokens: Any, prompt_tokens: int) -> Any:
        running = self._running
        self._running = {**running, "kernel": "auto" if running["kernel"] == "eager" else "eager"}
        found = sound(self, tokens, prompt_tokens)
        self._running = running
        return found

    monkeypatch.setattr(fake._InProcessAdapter, "_predict", predict)


QUANTISED = {"cache": "quantized", "kernel": "eager", "graph": "off"}


@pytest.mark.usefixtures("careless")
def test_what_runs_today_may_lose_what_it_loses_and_nobody_much_more(tmp_path: Path, in_process_worker: type) -> None:
    request = {"space": "full", "pinned": {"cache": "quantized"}, "incumbent": {"kernel": "eager"}}
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:trained", **request).plan
    today, fast = plan.candidate(plan.incumbent.id), next(one for one in plan.candidates if "kernel" not in one.label)
    assert today.score is not None
    assert fast.score is not None
    assert fast.score.value > today.score.value
    assert fast.fidelity.verdict == "lossy"
    assert plan.winner == plan.incumbent


@pytest.mark.usefixtures("careless")
def test_others_may_lose_as_much_as_what_runs_today(tmp_path: Path, in_process_worker: type) -> None:
    """Today's loses far more than the limit; so others that lose the same in another way may take its place."""
    request = {"space": "full", "incumbent": {"cache": "quantized"}}
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:trained", **request).plan
    today = plan.candidate(plan.incumbent.id)
    assert (today.fidelity.kl_nats or 0) > 0.01
    assert today.fidelity.verdict == "close"
    assert today.eligible
    run = events(tmp_path / "out")
    orders = [order.cells[0].candidate for order in run.launches if order.purpose == "fidelity"]
    assert orders[0] == run.incumbent, "what others may lose is known before they are judged"


@pytest.mark.usefixtures("careless")
def test_who_shares_what_its_reference_loses_has_to_say_the_same(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "reference", lambda self, settings, incumbent, shape: QUANTISED)
    request = {"space": "full", "pinned": {"cache": "quantized"}, "incumbent": {"kernel": "eager"}}
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:trained", **request).plan
    failures = {one.failure.kind for one in plan.candidates if one.failure is not None}
    assert failures == {"wrong_output"}
    assert plan.winner == plan.incumbent


def test_what_is_wrong_with_a_reference_is_not_charged_to_whom_it_judges(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvat_core import fake

    sound = fake._InProcessAdapter.score

    def score(self: Any, *arguments: Any) -> Any:
        if self._running["cache"] == "dynamic":
            raise EngineError("wrong_output", "no numbers")
        return sound(self, *arguments)

    monkeypatch.setattr(fake._InProcessAdapter, "score", score)
    plan = tuned(tmp_path / "out", in_process_worker, model="fake:trained").plan
    assert plan.require_winner().settings["cache"] == "static"
    assert not any(one.failure for one in plan.candidates)
    assert any("was not held against its reference: wrong_output" in note for note in plan.notes)
