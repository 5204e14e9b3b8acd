"""The decision of a plan in one plain sentence, for reports and for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvat_report import numbers
from kvat_report.text import one_line

if TYPE_CHECKING:
    from kvat_core.schema import CandidateResult, Choice, Plan

Show = Callable[[str], str]
MUCH = 0.1
"""Relative difference that a machine should be able to tell."""


def decision(plan: Plan, show: Show = one_line) -> str:
    """What to do, by how much it is better, and than what.

    Args:
        show: makes a foreign string (label, reason) safe for where the sentence goes.
    """
    verdicts = {"better": _better, "tie": _tie, "undecided": _undecided}
    so_far = "By what was measured before the run was ended: " if plan.partial else ""
    if plan.winner is None:
        return so_far + _infeasible(plan, show)
    return so_far + verdicts[plan.verdict](plan, plan.winner, show)


def _infeasible(plan: Plan, show: Show) -> str:
    nearest = plan.closest[0]
    misses = " and ".join(show(miss.reason) for miss in nearest.misses)
    return f"Infeasible: no candidate keeps the limits; the closest, {show(nearest.label)}, {misses}."


def _better(plan: Plan, winner: Choice, show: Show) -> str:
    switch = f"Better: switch to {_winner(plan, winner, show)}"
    today = f"what you run today ({show(plan.incumbent.label)})"
    if plan.ratio is None:
        return f"{switch}; {today} has no figures to compare with{_why_no_figures(plan, show)}."
    if because := _limits_of_today(plan, show):
        return f"{switch}, as {today} {because}; its score is {numbers.ratio(plan.ratio.score)} that of today."
    return f"{switch}, whose score is {numbers.ratio(plan.ratio.score)} that of {today}."


def _limits_of_today(plan: Plan, show: Show) -> str:
    """Limits for which the incumbent could not stay, whatever its score; empty where it could."""
    today, chosen = (plan.candidate(choice.id).limits for choice in (plan.incumbent, plan.require_winner()))
    failed = [one for one in today if one.verdict == "fail"]
    doubtful = [one for one in today if one.verdict == "undecided"]
    sure = all(one.verdict == "pass" for one in chosen)
    return " and ".join(show(one.reason) for one in failed or (doubtful if sure else []))


def _winner(plan: Plan, winner: Choice, show: Show) -> str:
    if winner.label != "default":
        return show(winner.label)
    today = plan.incumbent.settings
    changes = (f"{knob}={value}" for knob, value in winner.settings.items() if today.get(knob) != value)
    return f"the engine's defaults ({show(' '.join(changes))})"


def _why_no_figures(plan: Plan, show: Show) -> str:
    incumbent = plan.candidate(plan.incumbent.id)
    if incumbent.failure is not None:
        return f": it failed with {incumbent.failure.kind} ({show(incumbent.failure.reason)})"
    return f": {show(incumbent.reason)}" if incumbent.reason else ""


def _tie(plan: Plan, winner: Choice, show: Show) -> str:
    keep = f"Tie: keep what you run today ({show(winner.label)})"
    best = _best_other(plan, winner)
    if best is None:
        return f"{keep}; {_nothing_else(plan, winner)}."
    assert plan.confidence is not None, "a plan with a winner has one"
    least = numbers.percent(plan.confidence.epsilon)
    if best.score is not None and best.score.value <= 1:
        seen = f"{show(best.label)}, scores {numbers.ratio(best.score)}"
        return f"{keep}; no alternative is faster: the best of them, {seen}."
    return (
        f"{keep}; the best alternative, {show(best.label)}, scores {numbers.ratio(best.score)}, "
        f"and differences under {least} are not claimed on this machine{_calmer(plan.confidence.epsilon)}."
    )


def _undecided(plan: Plan, winner: Choice, show: Show) -> str:
    if winner.id != plan.incumbent.id:
        return _perhaps(plan, winner, show)
    keep = f"Undecided: keep what you run today ({show(winner.label)}) for now"
    best = _best_other(plan, winner)
    if best is None or best.score is None:
        return f"{keep}; {_nothing_else(plan, winner)}."
    launches = "1 launch" if best.score.n == 1 else f"{best.score.n} launches"
    if best.score.value <= 1:
        return f"{keep}; after {launches} no alternative seems faster, which is too few to say so."
    more = "go on with --resume" if plan.partial else "measure again with more launches in the profile"
    return f"{keep}; {show(best.label)} scores {numbers.ratio(best.score)}, which {launches} cannot confirm: {more}."


def _perhaps(plan: Plan, winner: Choice, show: Show) -> str:
    """Where what runs today misses a limit, and nobody is shown to keep all."""
    doubt = " and ".join(show(one.reason) for one in plan.candidate(winner.id).limits if one.verdict == "undecided")
    return (
        f"Undecided: what you run today ({show(plan.incumbent.label)}) {_limits_of_today(plan, show)}, and "
        f"{_winner(plan, winner, show)} {doubt}."
    )


def _nothing_else(plan: Plan, winner: Choice) -> str:
    others = [one for one in plan.candidates if one.id != winner.id and one.state == "ok"]
    doubtful = sum(any(limit.verdict == "undecided" for limit in one.limits) for one in others)
    if doubtful:
        return f"of {doubtful} others it is not known whether they keep the limits"
    return "nothing else was measured that could replace it"


def _calmer(epsilon: float) -> str:
    """What to do where hardly any difference could be claimed."""
    return ", which is much: measure on a calmer one, or more launches" if epsilon > MUCH else ""


def _best_other(plan: Plan, winner: Choice) -> CandidateResult | None:
    others = [other for other in plan.candidates if other.state == "ok" and other.score and not other.reason]
    return max(
        (other for other in others if other.id != winner.id),
        key=lambda other: other.score.value if other.score else 0.0,
        default=None,
    )
