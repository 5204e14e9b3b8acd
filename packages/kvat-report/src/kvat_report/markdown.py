"""The Markdown report: `templates/report.md.jinja` is the document, this module what it needs to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvat_report import numbers
from kvat_report.decision import decision
from kvat_report.labels import some_of
from kvat_report.output import output
from kvat_report.text import Markdown, escape

if TYPE_CHECKING:
    from jinja2 import Environment

    from kvat_core.schema import CandidateResult, CompileCost, Condition, Plan, ScenarioResult

_STATES = ("ok", "undecided", "pruned", "not_reached", "failed", "excluded")
_TAIL = 200
"""Characters of a failed worker's last line that are shown."""
_CONDITIONS = {
    "device_memory_free_below": "less than {} of device memory is free",
    "host_memory_free_below": "less than {} of memory is free",
    "prompt_longer_than": "the prompt is longer than {} tokens",
    "prompt_at_most": "the prompt has at most {} tokens",
    "batch_above": "the batch is larger than {}",
    "batch_at_most": "the batch is at most {}",
    "feature_missing": "{} cannot run",
    "error_kind": "the winner has ended with {}",
    "requests_below": "a process serves fewer than {} calls",
}
_METRICS = {
    "ttft": "time to first token",
    "decode": "decoding",
    "memory": "memory",
    "stability": "steadiness",
    "context": "longest context",
}


class MarkdownReport:
    """Renderer under the entry-point group ``kvat.reports``."""

    name = "markdown"
    file_name = "report.md"

    def render(self, plan: Plan) -> str:
        """The whole report; a pure function of the plan."""
        return _environment().get_template("report.md.jinja").render(_context(plan))


def _environment() -> Environment:
    # Jinja takes a tenth of a second to import, and most commands render nothing.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kvat_report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_safe,
    )
    own = (
        numbers.agreement,
        numbers.nats,
        numbers.percent,
        numbers.plain,
        numbers.rate,
        numbers.ratio,
        numbers.seconds,
        numbers.size,
        numbers.time,
    )
    environment.filters.update({render.__name__: _trusted(render) for render in own})
    return environment


def _safe(value: Any) -> str:
    """What an expression of the template becomes: escaped, unless it is Markdown of our own making."""
    return value if isinstance(value, Markdown) else escape(str(value))


def _trusted(render: Callable[[Any], str]) -> Callable[[Any], Markdown]:
    return lambda value: Markdown(render(value))


def _winner_bandwidth(plan: Plan) -> list[ScenarioResult]:
    """Scenarios of the winner in which it is known how much of the memory's bandwidth it uses."""
    scenarios = () if plan.winner is None else plan.candidate(plan.winner.id).scenarios
    return [result for result in scenarios if result.bandwidth_use is not None]


def _context(plan: Plan) -> dict[str, Any]:
    labels = {candidate.id: candidate.label for candidate in plan.candidates}
    ranking = sorted((one for one in plan.candidates if one.state != "excluded"), key=_rank)
    return {
        "plan": plan,
        "decision": Markdown(decision(plan, escape)),
        "label": lambda candidate_id: labels.get(candidate_id, candidate_id),
        "ranking": ranking,
        "roles": _roles(plan),
        "winner_bandwidth": _winner_bandwidth(plan),
        "memory": _memory,
        "kv_cache": _kv_cache,
        "energy": _energy,
        "has_energy": any(result.energy_per_token_j is not None for _, result in _measured(plan)),
        "last_line": _last_line,
        "judged": [(candidate, limit) for candidate in ranking for limit in candidate.limits],
        "faithful": [candidate for candidate in ranking if candidate.fidelity.kl_nats is not None],
        "output": output(plan),
        "out": _out(plan),
        "unstable": [candidate for candidate in plan.candidates if candidate.unstable],
        "compiled": [(candidate, result) for candidate, result in _measured(plan) if result.compile_cost is not None],
        "new_length": _new_length,
        "when": _when,
        "total_weight": sum(scenario.weight for scenario in plan.profile.scenarios),
        "shares": _shares(plan),
        "nothing": numbers.NOTHING,
    }


def _rank(candidate: CandidateResult) -> tuple[int, float, str]:
    score = candidate.score.value if candidate.score else 0.0
    return _STATES.index(candidate.state), -score, candidate.label


def _out(plan: Plan) -> list[tuple[str, str, str]]:
    """State, reason and candidates of all that cannot win, those of one reason together."""
    labels: dict[tuple[str, str], list[str]] = {}
    for one in sorted(plan.candidates, key=_rank):
        if one.reason:
            labels.setdefault((one.state, one.reason), []).append(one.label)
    return [(state, reason, some_of(those)) for (state, reason), those in labels.items()]


def _roles(plan: Plan) -> dict[str, str]:
    if plan.winner is None:
        return {plan.incumbent.id: "runs today"}
    if plan.winner.id == plan.incumbent.id:
        return {plan.winner.id: "runs today, keep"}
    return {plan.incumbent.id: "runs today", plan.winner.id: "winner"}


def _memory(result: ScenarioResult) -> str:
    peaks = {"device": result.peak_device_bytes, "host": result.peak_host_bytes}
    known = [f"{numbers.size(peak)} {where}" for where, peak in peaks.items() if peak is not None]
    return ", ".join(known) or numbers.NOTHING


def _measured(plan: Plan) -> list[tuple[CandidateResult, ScenarioResult]]:
    return [(candidate, result) for candidate in plan.candidates for result in candidate.scenarios]


def _kv_cache(result: ScenarioResult) -> str:
    """Bytes of the live cache, and what its shape says where that is something else."""
    held, predicted = result.kv_cache_bytes, result.kv_cache_predicted_bytes
    differs = predicted is not None and held is not None and abs(held - predicted) > 0.01 * predicted
    return numbers.size(held) + (f" (by its shape {numbers.size(predicted)})" if differs else "")


def _energy(result: ScenarioResult) -> str:
    if result.energy_per_token_j is None:
        return numbers.NOTHING
    return f"{numbers.plain(result.energy_per_token_j)} J"


def _new_length(cost: CompileCost) -> str:
    """What a prompt of another length costs, as far as it compiles anything."""
    seconds, graphs = cost.another_length_s, cost.another_length_graphs
    if seconds is None:
        return numbers.NOTHING
    return f"{numbers.seconds(seconds)} ({graphs} graph{'s' if graphs != 1 else ''})" if graphs else "no graph"


def _when(condition: Condition) -> str:
    """All that has to hold, in words."""
    return " and ".join(
        _CONDITIONS[key].format(numbers.size(int(value)) if "_memory_" in key else value)
        for key, value in condition.keys().items()
    )


def _last_line(text: str) -> str:
    lines = text.split("\n")
    return next((line.strip()[-_TAIL:] for line in reversed(lines) if line.strip()), numbers.NOTHING)


def _shares(plan: Plan) -> list[tuple[str, float]]:
    shares = plan.profile.objective.shares()
    total = sum(shares.values())
    return [(_METRICS[metric], share / total) for metric, share in shares.items() if share > 0]
