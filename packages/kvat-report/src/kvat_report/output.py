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
    winner = plan.candidate(plan.winner.id).fidelity
    told = [_fidelity(winner), _close_to_what(winner, plan), plan.canary and _CANARY[plan.canary]]
    return "; ".join(filter(None, told)) or None


def _close_to_what(winner: FidelityResult, plan: Plan) -> str | None:
    """The limits within which a winner is close, as what runs today may have widened them."""
    if winner.verdict != "close" or plan.fidelity_limits is None:
        return None
    most = plan.fidelity_limits
    return f"allowed were KL {most.kl_nats:.3g} nats, and first choices that agree in {100 * most.top1_agreement:.3g} %"


def _fidelity(seen: FidelityResult) -> str | None:
    if seen.verdict is None:
        return None
    if seen.kl_nats is None or seen.top1_agreement is None:
        return "exact, as it computes what others are held against" if seen.verdict == "exact" else None
    of = f"over {seen.tokens} forced tokens of text, KL {numbers.nats(seen.kl_nats)} nats, first choices agree in "
    words = {"not_meaningful": "not meaningful, as the weights are random"}
    return f"{words.get(seen.verdict, seen.verdict)} ({of}{numbers.agreement(seen.top1_agreement)})"
