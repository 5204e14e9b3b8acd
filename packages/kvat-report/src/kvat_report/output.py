"""What is known of the winner's output, in one plain sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvat_report import numbers

if TYPE_CHECKING:
    from kvat_core.schema import FidelityResult, Plan

_CANARY = {
    "clean": "requests leave nothing behind for the next",
    "undetermined": "whether requests leave anything behind could not be told",
    "leak": "requests leave something behind for the next",
}


def output(plan: Plan) -> str | None:
    """Fidelity and isolation of the winner; None where there is no winner, or nobody looked."""
    if plan.winner is None:
        return None
    told = [_fidelity(plan.candidate(plan.winner.id).fidelity), plan.canary and _CANARY[plan.canary]]
    return "; ".join(filter(None, told)) or None


def _fidelity(seen: FidelityResult) -> str | None:
    if seen.verdict is None:
        return None
    if seen.kl_nats is None or seen.top1_agreement is None:
        return "exact, as it computes what others are held against" if seen.verdict == "exact" else None
    of = f"over {seen.tokens} forced tokens, KL {numbers.nats(seen.kl_nats)} nats, first choices agree in "
    words = {"not_meaningful": "not meaningful, as the weights are random"}
    return f"{words.get(seen.verdict, seen.verdict)} ({of}{numbers.agreement(seen.top1_agreement)})"
