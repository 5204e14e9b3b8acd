"""The last step of a search: how long a context the finalists can serve, where the run asks for it."""

from __future__ import annotations

from kvat_core import context
from kvat_core.decision import decide
from kvat_core.run import Run
from kvat_core.schema import Cell, LaunchOrder


def next_context_trial(run: Run) -> LaunchOrder | None:
    """The next launch that tries a length, or None when enough is known."""
    for name in _wanted(run):
        tokens = context.to_try(run, name)
        if tokens is not None:
            return LaunchOrder(
                launch=len(run.launches),
                round=1 + max(order.round for order in run.launches),
                purpose="context",
                cells=(Cell(candidate=name, scenario=context.scenario(tokens).key),),
                samples=context.CALLS,
            )
    return None


def context_trials_left(run: Run) -> int:
    """Launches for longest contexts still to come, at least: what a trial shows decides how many follow."""
    return sum(context.to_try(run, name) is not None for name in _wanted(run))


def _wanted(run: Run) -> list[str]:
    """Winner and incumbent, in this order: who falls short of a limit makes room for the next best, who is tried then.

    The incumbent's turn comes when a winner stands. Before, to know that it keeps the limit would be to prefer it to
    all others, of whom nobody knows it yet.
    """
    decision = None if run.header.longest_context is None else decide(run)
    if decision is None:
        return []
    finalists = [decision.winner, *({run.incumbent} & set(run.live))]
    return list(dict.fromkeys(run.alias_of(name) or name for name in finalists))
