"""What is known of the winner's output, in one plain sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvat_report import numbers

if TYPE_CHECKING:
    from kvat_core.schema import FidelityResult, Plan

_CANARY = {
    "clean": "what earlier requests said changes no answer",
    "undetermined": "whether what earlier requests said changes an answer could not be told",
}


def output(plan: Plan) -> str | None:
    """Fidelity and isolation of the winner; None where there is no winner, or nobody looked."""
    if plan.winner is None:
        return None
    winner, today = (plan.candidate(one.id).fidelity for one in (plan.winner, plan.incumbent))
    told = [_fidelity(winner), _beside(winner, today), plan.canary and _CANARY[plan.canary]]
    return "; ".join(filter(None, told)) or None


def _beside(winner: FidelityResult, today: FidelityResult) -> str | None:
    """What closeness is measured by, where what runs today loses something itself."""
    if winner.verdict != "close" or today.verdict != "close":
        return None
    return f"others may lose as much as what runs today, KL {numbers.nats(today.kl_nats)} nats, and the limits beyond"


def _fidelity(seen: FidelityResult) -> str | None:
    if seen.verdict is None:
        return None
    if seen.kl_nats is None or seen.top1_agreement is None:
        return "exact, as it computes what others are held against" if seen.verdict == "exact" else None
    of = f"over {seen.tokens} forced tokens of text, KL {numbers.nats(seen.kl_nats)} nats, first choices agree in "
    words = {"not_meaningful": "not meaningful, as the weights are random"}
    return f"{words.get(seen.verdict, seen.verdict)} ({of}{numbers.agreement(seen.top1_agreement)})"
