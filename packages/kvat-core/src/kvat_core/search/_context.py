"""The last step of a search: how long a context the finalists can serve, where the run asks for it."""

from __future__ import annotations

from kvat_core import context, scoring
from kvat_core.decision import decide
from kvat_core.run import Run
from kvat_core.schema import Cell, LaunchOrder


def next_context_trial(run: Run) -> LaunchOrder | None:
    """The next launch that tries a length, or None when enough is known."""
    for name in _wanted(run):
        attempt = context.attempt(run, name)
        if attempt is not None:
            return LaunchOrder(
                launch=len(run.launches),
                round=1 + max(order.round for order in run.launches),
                purpose="context",
                cells=(Cell(candidate=name, scenario=context.scenario(attempt.tokens).key),),
                samples=attempt.calls,
            )
    return None


def context_trials_left(run: Run) -> int:
    """Launches for longest contexts still to come, at least: what a trial shows decides how many follow."""
    return sum(context.attempt(run, name) is not None for name in _wanted(run))


def _wanted(run: Run) -> list[str]:
    """Winner and incumbent; once anybody has fallen short of the limit, whoever else was measured, too."""
    decision = None if run.header.longest_context is None else decide(run)
    if decision is None:
        return []
    finalists = [decision.winner, *({run.incumbent} & set(run.live) - {decision.winner})]
    others = [name for name in run.live if name not in finalists and scoring.complete_rounds(run, name)]
    everybody = [name for name in [*finalists, *others] if run.alias_of(name) is None]
    return everybody if context.falls_short(run, everybody) else everybody[: len(finalists)]
