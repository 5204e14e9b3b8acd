"""What a run decides: differences, not means; and nothing that it did not see."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvat_core.decision import decide
from kvat_core.field import Field
from kvat_core.run import Run
from kvat_core.schema import (
    Cell,
    Failed,
    Failure,
    LaunchOrder,
    Limits,
    Measured,
    Objective,
    Profile,
    Resources,
    Scenario,
)
from kvat_core.scoring import compared_peaks

MakeRun = Callable[..., Run]


def fail(run: Run, name: str) -> None:
    failure = Failure(kind="oom_host", phase="sample", reason="the host ran out of memory")
    run.add(Failed(launch=0, cell=Cell(candidate=name, scenario="8+3x1"), failure=failure))


def test_a_clear_difference_wins(make_run: MakeRun) -> None:
    decision = decide(make_run({"today": [1.0, 1.01, 0.99], "fast": [0.5, 0.505, 0.495], "slow": [2.0, 2.02, 1.98]}))
    assert decision is not None
    assert (decision.winner, decision.verdict, decision.equivalents) == ("fast", "better", ())
    assert decision.ratios is not None
    assert decision.ratios.score.value == pytest.approx(2.0)


def test_drift_that_meets_all_alike_changes_nothing(make_run: MakeRun) -> None:
    drift = [1.0, 3.0, 9.0]
    decision = decide(make_run({"today": drift, "fast": [0.8 * pace for pace in drift]}))
    assert decision is not None
    assert (decision.winner, decision.verdict) == ("fast", "better")


def test_no_real_difference_keeps_the_default(make_run: MakeRun) -> None:
    decision = decide(make_run({"today": [1.0, 1.02, 0.98], "other": [0.99, 1.01, 0.985]}))
    assert decision is not None
    assert (decision.winner, decision.verdict, decision.equivalents) == ("today", "tie", ("other",))


def test_a_large_difference_that_noise_explains_is_no_win(make_run: MakeRun) -> None:
    decision = decide(make_run({"today": [1.0, 1.0, 1.0], "wild": [0.5, 1.2, 0.6]}))
    assert decision is not None
    assert (decision.winner, decision.verdict) == ("today", "tie")
    assert (decision.confidence.noise_floor or 0.0) > 0.2


def test_one_block_decides_nothing(make_run: MakeRun) -> None:
    decision = decide(make_run({"today": [1.0], "fast": [0.5]}))
    assert decision is not None
    assert (decision.winner, decision.verdict) == ("today", "undecided")


def test_the_simplest_of_the_equally_fast_wins(make_run: MakeRun) -> None:
    paces = {"today": [1.0, 1.01, 0.99], "compiled": [0.5, 0.51, 0.49], "plain": [0.501, 0.509, 0.491]}
    decision = decide(make_run(paces, compiles=["compiled"]))
    assert decision is not None
    assert (decision.winner, decision.equivalents) == ("plain", ("compiled",))


def test_the_simplest_does_not_win_for_being_measured_badly(make_run: MakeRun) -> None:
    # Slower than "fast" in every block, by 6 to 45 %, but so unevenly that the interval of their ratio holds 1.
    uneven = [0.3 * math.exp(behind) for behind in (0.30, 0.60, 0.06)]
    paces = {"today": [1.0, 1.0, 1.0], "plain": uneven, "fast": [0.3, 0.3, 0.3]}
    decision = decide(make_run(paces, compiles=["fast"]))
    assert decision is not None
    assert (decision.winner, decision.verdict, decision.equivalents) == ("fast", "better", ("plain",))


def test_with_a_failed_incumbent_and_one_block_the_fastest_is_taken(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0], "slow": [2.0], "fast": [0.5]})
    fail(run, "today")
    decision = decide(run)
    assert decision is not None
    assert decision.winner == "fast"


def test_equivalents_are_those_of_the_winner_and_not_of_the_leader(make_run: MakeRun) -> None:
    # The leader cannot be confirmed, so today stays; what is shown worse than today is no equivalent of it.
    paces = {"today": [1.0, 1.0, 1.0], "wild": [0.5, 1.2, 0.6], "slow": [3.0, 3.3, 3.6]}
    decision = decide(make_run(paces))
    assert decision is not None
    assert (decision.winner, decision.equivalents) == ("today", ("wild",))


def test_what_may_change_the_output_never_wins(make_run: MakeRun) -> None:
    decision = decide(make_run({"today": [1.0, 1.01, 0.99], "lossy": [0.1, 0.1, 0.1]}, lossy=["lossy"]))
    assert decision is not None
    assert decision.winner == "today"
    assert "lossy" in decision.scores


def test_what_failed_never_wins(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0, 1.01, 0.99], "fast": [0.1, 0.1, 0.1]})
    fail(run, "fast")
    decision = decide(run)
    assert decision is not None
    assert decision.winner == "today"
    assert "fast" not in decision.scores


def test_without_a_working_incumbent_the_simplest_good_candidate_wins_without_a_ratio(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0, 1.0, 1.0], "fast": [0.50, 0.51, 0.49], "slow": [2.0, 2.1, 1.9]})
    fail(run, "today")
    decision = decide(run)
    assert decision is not None
    assert (decision.winner, decision.ratios) == ("fast", None)


@pytest.mark.parametrize(("weights", "winner"), [((9.0, 1.0), "short"), ((1.0, 9.0), "long")])
def test_a_scenario_counts_by_its_weight(make_run: MakeRun, weights: tuple[float, float], winner: str) -> None:
    scenarios = tuple(
        Scenario(prompt_tokens=tokens, output_tokens=3, weight=weight)
        for tokens, weight in zip((8, 9), weights, strict=True)
    )
    profile = Profile(name="two", scenarios=scenarios, objective=Objective(ttft=1), samples=1)
    today, twice, half = [1.0, 1.01, 0.99], [0.5, 0.51, 0.49], [2.0, 2.01, 1.99]
    run = make_run({"today": today, "short": twice, "long": half}, profile=profile)
    for one in make_run({"today": today, "short": half, "long": twice}).samples:
        run.add(one.model_copy(update={"scenario": scenarios[1].key}))
    decision = decide(run)
    assert decision is not None
    assert (decision.winner, decision.verdict) == (winner, "better")


def test_nothing_eligible_is_no_decision(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0, 1.0, 1.0]})
    fail(run, "today")
    assert decide(run) is None


def test_an_alias_is_neither_a_rival_nor_an_equivalent(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0, 1.01, 0.99], "twin": [], "slow": [2.0, 2.02, 1.98]}, same=[("twin", "today")])
    decision = decide(run)
    assert decision is not None
    assert decision.equivalents == ()
    assert set(decision.scores) == {"today", "slow"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(scale=st.floats(min_value=0.01, max_value=100), seed=st.integers(0, 10_000))
def test_a_slower_machine_decides_the_same(make_run: MakeRun, scale: float, seed: int) -> None:
    source = random.Random(seed)
    paces = {name: [source.uniform(0.8, 1.2) for _ in range(4)] for name in ("today", "a", "b", "c")}
    one = decide(make_run(paces))
    other = decide(make_run({name: [scale * pace for pace in values] for name, values in paces.items()}))
    assert one is not None
    assert other is not None
    assert (one.winner, one.verdict, one.equivalents) == (other.winner, other.verdict, other.equivalents)


def test_equal_candidates_are_hardly_ever_called_better(make_run: MakeRun) -> None:
    source = random.Random(11)
    worlds = 300
    verdicts = []
    for _ in range(worlds):
        blocks = [source.gauss(1, 0.05) for _ in range(3)]
        paces = {name: [block * source.gauss(1, 0.03) for block in blocks] for name in "abcdef"}
        decision = decide(make_run(paces))
        assert decision is not None
        verdicts.append(decision.verdict)
    assert verdicts.count("better") / worlds <= 0.05
    assert verdicts.count("tie") / worlds >= 0.9


def test_a_peak_that_is_unknown_for_one_counts_for_none(make_run: MakeRun) -> None:
    objective = Objective(ttft=0.45, decode=0.45, memory=0.1)
    profile = Profile(name="m", scenarios=(Scenario(prompt_tokens=8, output_tokens=3),), objective=objective, samples=1)
    paces = {"today": [1.0, 1.01, 0.99], "slow": [2.0, 2.02, 1.98]}
    decision = decide(make_run(paces, peaks={"today": 800}, profile=profile))
    assert decision is not None
    assert decision.winner == "today"
    assert decision.scores["slow"].value < 1


BY_MEMORY = Profile(
    name="m",
    scenarios=(Scenario(prompt_tokens=8, output_tokens=3),),
    objective=Objective(ttft=0.3, decode=0.3, memory=0.4),
    samples=1,
)
EQUAL = {"today": [1.0, 1.01, 0.99], "a": [1.0, 1.01, 0.99], "b": [1.0, 1.01, 0.99]}


@pytest.mark.parametrize(
    ("own", "unreadable", "compared"),
    [
        ({"today": 900, "a": 700, "b": 600}, [], {"today": 900, "a": 700, "b": 600}),
        # Who has a peak of its own is compared by it, whatever is unknown of others, who gain nothing by that.
        ({"today": 900, "b": 600}, ["a"], {"today": 900, "a": 1000, "b": 600}),
        # Without that of the incumbent there is nothing to compare with.
        ({"a": 700, "b": 600}, ["today"], {}),
        # A run that was ended early has not read all.
        ({"today": 900, "b": 600}, [], {}),
        # Plenty.
        ({"today": 400, "a": 300, "b": 200}, [], {}),
    ],
)
def test_peaks_are_compared_where_memory_is_short_and_an_unreadable_one_is_no_advantage(
    make_run: MakeRun, own: dict[str, int], unreadable: list[str], compared: dict[str, int]
) -> None:
    run = make_run(EQUAL, peaks=own, unreadable=unreadable, profile=BY_MEMORY)
    assert compared_peaks(run) == compared
    decision = decide(run)
    assert decision is not None
    today = math.log(compared.get("today", 1))
    for name, peak in compared.items():
        assert math.log(decision.scores[name].value) == pytest.approx(0.4 * (today - math.log(peak)))


def test_where_there_is_plenty_an_unreadable_peak_costs_nothing(make_run: MakeRun) -> None:
    run = make_run(EQUAL, peaks={"today": 300}, unreadable=["a"], profile=BY_MEMORY)
    together = tuple(Cell(candidate=name, scenario="8+3x1") for name in EQUAL)
    run.add(Measured(launch=0, cells=together, resources=Resources(processes=("worker",), peak_host_bytes=400)))
    assert compared_peaks(run) == {}
    run.add(Measured(launch=1, cells=together, resources=Resources(processes=("worker",), peak_host_bytes=900)))
    assert compared_peaks(run) == {}


def test_less_memory_breaks_a_tie_only_where_memory_binds(make_run: MakeRun) -> None:
    paces = {"today": [1.0, 1.01, 0.99], "a": [0.5, 0.505, 0.495], "b": [0.5, 0.505, 0.495]}
    plenty = decide(make_run(paces, peaks={"today": 300, "a": 400, "b": 200}))
    scarce = decide(make_run(paces, peaks={"today": 800, "a": 900, "b": 600}))
    assert plenty is not None
    assert scarce is not None
    assert (plenty.winner, scarce.winner) == ("a", "b")


def test_of_equals_one_that_may_lose_output_is_taken_last(make_run: MakeRun) -> None:
    paces = {"today": [1.0, 1.01, 0.99], "a": [0.5, 0.505, 0.495], "b": [0.5, 0.505, 0.495]}
    profile = BY_MEMORY.model_copy(
        update={"objective": Objective(ttft=1, decode=1), "limits": Limits(allow_lossy=True)}
    )
    peaks = {"today": 800, "a": 900, "b": 600}
    decision = decide(make_run(paces, peaks=peaks, lossy=["b"], profile=profile))
    assert decision is not None
    assert (decision.winner, decision.equivalents) == ("a", ("b",))


def test_candidates_that_never_met_are_compared_through_what_runs_today(make_run: MakeRun) -> None:
    """As where one failed in a block and another one came in with it, and the run was cut in that block."""
    run = make_run({"today": [1.0, 1.0], "leader": [0.5], "late": []})
    run.add(
        next(one for one in run.samples if one.candidate == "leader").model_copy(
            update={"candidate": "late", "round": 1}
        )
    )
    decision = decide(run)
    assert decision is not None
    assert Field(run).mean("late", "leader") == pytest.approx(0.0)
    assert set(decision.scores) == {"today", "leader", "late"}


@pytest.mark.parametrize(("others", "df"), [(0, 2), (1, 4), (3, 8), (9, 12)])
def test_the_blocks_of_a_pair_count_once(make_run: MakeRun, others: int, df: int) -> None:
    """Of k candidates in b blocks there are (k - 1)(b - 1) degrees of freedom; a pair borrows at most ten of others."""
    source = random.Random(0)
    names = ["today", "one", *(f"other{number}" for number in range(others))]
    run = make_run({name: [math.exp(source.gauss(0, 0.01)) for _ in range(3)] for name in names})
    assert Field(run).compare("one", "today").df == pytest.approx(df)


def test_intervals_of_two_candidates_cover_the_truth(make_run: MakeRun) -> None:
    source, covered, worlds = random.Random(1), 0, 400
    for _ in range(worlds):
        paces = {name: [math.exp(source.gauss(0, 0.02)) for _ in range(3)] for name in ("today", "other")}
        ratio = Field(make_run(paces)).compare("other", "today").ratio()
        assert ratio.low is not None
        assert ratio.high is not None
        covered += ratio.low <= 1 <= ratio.high
    assert 0.92 <= covered / worlds <= 0.98


def test_a_single_launch_shows_nobody_to_be_equivalent(make_run: MakeRun) -> None:
    decision = decide(make_run({"today": [1.0], "slow": [2.0]}))
    assert decision is not None
    assert decision.equivalents == ()


def test_who_was_not_reached_may_be_better(make_run: MakeRun) -> None:
    all_seen = decide(make_run({"today": [1.0] * 6, "slow": [2.0, 2.01, 2.0, 1.99, 2.0, 2.0]}))
    cut = decide(make_run({"today": [1.0] * 6, "slow": [2.0, 2.01, 2.0, 1.99, 2.0, 2.0], "late": [], "later": []}))
    assert all_seen is not None
    assert cut is not None
    assert all_seen.confidence.probability == 0.99
    assert cut.confidence.probability <= 0.3


def test_of_equals_one_that_has_failed_before_is_not_taken(make_run: MakeRun) -> None:
    paces = {"today": [1.0, 1.01, 0.99], "a": [0.5, 0.505, 0.495], "b": [0.5, 0.505, 0.495]}
    run = make_run(paces)
    calm = decide(run)
    failure = Failure(kind="crash", phase="sample", reason="signal 11")
    run.add(LaunchOrder(launch=7, round=2, purpose="timing", cells=(Cell(candidate="a", scenario="8+3x1"),)))
    run.add(Failed(launch=7, cell=Cell(candidate="a", scenario="8+3x1"), failure=failure))
    after = decide(run)
    assert calm is not None
    assert after is not None
    assert "a" in run.live
    assert (calm.winner, after.winner) == ("a", "b")


@pytest.mark.parametrize("greedy", [False, True])
def test_a_greedy_candidate_that_cannot_win_changes_nothing_between_the_others(make_run: MakeRun, greedy: bool) -> None:
    paces = {"today": [1.0, 1.01, 0.99], "a": [0.9, 0.91, 0.89]}
    peaks = {"today": 300, "a": 400}
    alone = decide(make_run(paces, peaks=peaks, profile=BY_MEMORY))
    more = {**peaks, "slow": 900 if greedy else 450}
    joined = decide(make_run({**paces, "slow": [3.0, 3.1, 2.9]}, peaks=more, profile=BY_MEMORY))
    assert alone is not None
    assert joined is not None
    assert joined.winner == alone.winner == "a"
    assert joined.scores["a"].value == pytest.approx(alone.scores["a"].value)
    assert joined.scores["slow"].value == pytest.approx(
        (1 / 3) ** 0.6 * ((300 / 900) ** 0.4 if greedy else 1), rel=0.01
    )
