"""Pure: what was seen of a candidate's predictions → how faithful it is, and whether that will do."""

from __future__ import annotations

import math
from typing import Literal

from kvat_core.run import Run
from kvat_core.schema import (
    CanaryVerdict,
    Fidelity,
    FidelityLimits,
    FidelityResult,
    FidelityVerdict,
    Likeness,
    Scenario,
)

TEXT_STEPS = 256
"""Tokens of the text that are forced: twice what quantised caches of Transformers keep unquantised at the end, so that
what was decoded is quantised as well."""
GREEDY_STEPS = 64
"""Tokens of the reference's own choice; what claims to be exact has to choose all of them as well."""
LEAST_STEPS = 16
"""Fewer than these, where a model holds no more, tell too little."""
REQUESTS = 2
"""Most requests of a batch that are scored."""
ANSWER_TOKENS = 16
"""Output tokens of a request by which leaks are looked for."""

Wrong = Literal["wrong_output", "leak"]
"""Kinds of failure that vetting finds."""
MAX_KL_NATS = 0.01
MIN_TOP1_AGREEMENT = 0.99
"""How far a candidate may be from its reference if nobody says otherwise: by judgement, no source gives a figure."""
BROKEN_KL_NATS, BROKEN_TOP1_AGREEMENT = 1.0, 0.5
"""From here on it is another model that speaks, by judgement too."""
_EXACT_KL_NATS = 1e-6
"""Below this a divergence is the rounding of float32 in the scoring itself."""
_ROUNDING = 4.0
"""A divergence up to so many times that of rounding is rounding."""


def verdict(run: Run, candidate_id: str) -> FidelityVerdict | None:
    """How faithful a candidate is; None where it was not judged.

    exact: chooses as its reference wherever that has a clear choice, and differs by no more than rounding. close:
    within the limits, beyond what runs today loses. lossy: beyond them. broken: claims to be exact and clearly is not,
    or is hardly the same model any more. not_meaningful: random weights predict nothing that could be lost; they still
    tell broken and exact.
    """
    seen, candidate = run.fidelity.get(candidate_id), run.entry(candidate_id).candidate
    if run.entry(candidate_id).is_reference and not candidate.lossy:
        return "exact"
    if seen is None:
        return None
    if is_broken(run, candidate_id, seen):
        return "broken"
    worst, as_today = _losses(run, candidate_id), _is_as_precise_as_today(run, candidate_id)
    if as_today and _is_exact(seen):
        return "exact"
    if run.header.shape.weights == "random":
        return "not_meaningful"
    most = limits_in_force(run)
    kl_nats, agreement = sum(loss.kl_nats for loss in worst), min(loss.top1_agreement for loss in worst)
    within = kl_nats <= most.kl_nats and agreement >= most.top1_agreement
    return "close" if within else "lossy"


def is_broken(run: Run, candidate_id: str, seen: Fidelity) -> bool:
    """Whether a candidate is wrong, rather than less precise, by its predictions beside those of its reference."""
    parts, candidate = (seen.text, seen.greedy), run.entry(candidate_id).candidate
    # What random weights predict is so even that any loss changes it much.
    trained = run.header.shape.weights != "random"
    if trained and any(one.kl_nats > BROKEN_KL_NATS or one.top1_agreement < BROKEN_TOP1_AGREEMENT for one in parts):
        return True
    return candidate.exact and any(one.first_clear_divergence is not None for one in parts)


def objection(run: Run, candidate_id: str) -> str | None:
    """Why a candidate must not be recommended for what it loses, or None."""
    candidate = run.entry(candidate_id).candidate
    if run.header.profile.limits.allow_lossy:
        return None
    if not candidate.lossy:
        return _beyond_the_limits(run, candidate_id) if verdict(run, candidate_id) == "lossy" else None
    if run.header.shape.weights == "random":
        return "may change the output, which random weights cannot tell; --allow-lossy accepts that"
    judged = verdict(run, candidate_id)
    if judged is None:
        return "may change the output beyond rounding, which was not judged; --allow-lossy accepts that"
    if (lacks := run.fidelity[candidate_id].lacks) is not None and not _is_as_precise_as_today(run, candidate_id):
        return f"may change the output, and was not held against full precision ({lacks}); --allow-lossy accepts that"
    return _beyond_the_limits(run, candidate_id) if judged == "lossy" else None


def _beyond_the_limits(run: Run, candidate_id: str) -> str:
    losses, most = _losses(run, candidate_id), limits_in_force(run)
    kl_nats, agreement = sum(loss.kl_nats for loss in losses), min(loss.top1_agreement for loss in losses)
    what_helps = "--max-kl or --allow-lossy accepts" if agreement >= most.top1_agreement else "--allow-lossy accepts"
    return (
        f"loses fidelity: KL {_nats(kl_nats) if kl_nats > most.kl_nats else f'{kl_nats:.2g}'} nats of at most "
        f"{most.kl_nats:.3g}, first choices agree in {_share(agreement)} of at least "
        f"{100 * most.top1_agreement:.3g} %; {what_helps} that"
    )


def limits_in_force(run: Run) -> FidelityLimits:
    """The largest KL and the least agreement, where what runs today may lose as much as it does."""
    most_kl_nats, least_agreement = run.header.profile.limits.max_kl_nats or MAX_KL_NATS, MIN_TOP1_AGREEMENT
    today = run.alias_of(run.incumbent) or run.incumbent
    seen = run.fidelity.get(today)
    if seen is None or not is_measure(run, today):
        return FidelityLimits(kl_nats=most_kl_nats, top1_agreement=least_agreement)
    agreement = least_agreement - (1 - seen.text.top1_agreement)
    return FidelityLimits(kl_nats=most_kl_nats + seen.text.kl_nats, top1_agreement=agreement)


def may_be_accepted(run: Run, candidate_id: str) -> bool:
    """Whether a candidate's fidelity will do, as far as it is known; what is judged later may say otherwise."""
    to_come = can_be_judged(run, candidate_id) and candidate_id not in run.fidelity_tried
    return objection(run, candidate_id) is None or (to_come and run.header.shape.weights != "random")


def can_be_judged(run: Run, candidate_id: str) -> bool:
    """Whether there is a reference to hold a candidate against, and room for enough tokens."""
    entry = run.entry(candidate_id)
    # What others are held against may lose output by its precision alone.
    trivial = entry.is_reference and not entry.candidate.lossy
    return entry.reference is not None and not trivial and steps(run) >= LEAST_STEPS


def steps(run: Run) -> int:
    """Tokens that are forced after the prompt, as far as the model holds them."""
    holds = run.header.shape.max_context_tokens
    return TEXT_STEPS if holds is None else min(TEXT_STEPS, holds - _scored_prompt_tokens(run))


def scene(run: Run) -> Scenario:
    """Shape of what is scored: prompts as long as in the longest scenario, so that windows fill and chunks are cut."""
    return Scenario(prompt_tokens=_scored_prompt_tokens(run), output_tokens=steps(run), batch_size=_requests(run))


def canary_scene(run: Run) -> Scenario:
    """Shape of the longest request by which leaks are looked for."""
    return Scenario(prompt_tokens=canary_lengths(run)[1], output_tokens=ANSWER_TOKENS, batch_size=_requests(run))


def canary_lengths(run: Run) -> tuple[int, int, int]:
    """Prompt tokens of the request that is answered twice, of a longer one, and of a shorter one."""
    holds, usual = run.header.shape.max_context_tokens, min(one.prompt_tokens for one in run.scenarios.values())
    if holds is not None:
        usual = min(usual, (holds - ANSWER_TOKENS) * 4 // 5)
    usual = max(2, usual)
    quarter = max(1, usual // 4)
    return usual, usual + quarter, usual - quarter


def in_words(seen: Fidelity) -> str:
    """The figures that decide, for a reason."""
    parts = (seen.greedy, seen.text)
    clear = next((one.first_clear_divergence for one in parts if one.first_clear_divergence is not None), None)
    where = "" if clear is None else f", the first clearly other choice at token {clear + 1}"
    kl_nats, agreement = max(one.kl_nats for one in parts), min(one.top1_agreement for one in parts)
    return f"differs from its reference: KL {kl_nats:.2g} nats, first choices agree in {_share(agreement)}{where}"


def result(run: Run, candidate_id: str) -> FidelityResult:
    """What a plan tells of a candidate's fidelity."""
    # What was proven to run the very same thing shares its figures.
    name = run.alias_of(candidate_id) or candidate_id
    lossy, seen = run.entry(candidate_id).candidate.lossy, run.fidelity.get(name)
    told = FidelityResult(lossy=lossy, verdict=verdict(run, name))
    if seen is None:
        return told.model_copy(update={"reason": _why_not_judged(run, name) if name in run.fidelity_tried else None})
    return told.model_copy(
        update={
            "kl_nats": seen.text.kl_nats,
            "top1_agreement": seen.text.top1_agreement,
            "first_divergence": seen.greedy.first_divergence,
            "tokens": seen.text.steps,
            "full_precision_kl_nats": None if seen.full_precision is None else seen.full_precision.kl_nats,
            "reason": seen.lacks and f"not held against full precision: {seen.lacks}",
        }
    )


def is_measure(run: Run, candidate_id: str) -> bool:
    """Whether what a candidate loses, if it is what runs today, may be lost by others as well."""
    entry = run.entry(candidate_id)
    return entry.reference is not None and not entry.candidate.exact


def is_vouched_for(run: Run, candidate_id: str) -> bool:
    """Whether a candidate's predictions were looked at, or nobody could look at them."""
    return candidate_id in run.fidelity or not can_be_judged(run, candidate_id)


def canary(run: Run, candidate_id: str) -> CanaryVerdict | None:
    """Whether requests leave anything behind in a candidate; None = nobody looked."""
    found = run.canaries.get(run.alias_of(candidate_id) or candidate_id)
    return None if found is None else found.verdict


def notes(run: Run, winner: str) -> list[str]:
    """What a plan must not be silent about, where the winner was not vetted as it should have been."""
    name = run.alias_of(winner) or winner
    told = []
    if (why := _why_not_judged(run, name)) is not None:
        told.append(f"the winner's output was not held against its reference: {why}")
    seen = run.canaries.get(name)
    if seen is None and run.entry(name).reference is not None:
        told.append("whether the winner keeps requests apart was not looked at: the run did not come to it")
    if seen is not None and seen.verdict == "undetermined":
        told.append(f"whether the winner keeps requests apart could not be told: {seen.reason}")
    elif seen is not None and seen.reason:
        told.append(f"of the winner, {seen.reason}")
    return told


def _why_not_judged(run: Run, candidate_id: str) -> str | None:
    """None where it was judged, or is what others are held against, or where the engine cannot judge at all."""
    entry = run.entry(candidate_id)
    if entry.reference is None or candidate_id in run.fidelity or (entry.is_reference and not entry.candidate.lossy):
        return None
    if steps(run) < LEAST_STEPS:
        return f"the model holds fewer than {LEAST_STEPS} tokens after the prompt"
    failed = next((one.failure for one in run.judged if one.candidate == candidate_id and one.failure), None)
    return "the run did not come to it" if failed is None else f"{failed.kind}, {failed.reason}"


def _nats(value: float) -> str:
    """To two digits, rounded up: what misses a limit is not shown as keeping it."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1) if 0 < value < math.inf else 0.0
    return f"{math.ceil(round(value / step, 6)) * step:.2g}" if step else f"{value:.2g}"


def _share(value: float) -> str:
    """To a tenth of a percent, rounded down: what misses a limit is not shown as keeping it."""
    return f"{math.floor(round(1000 * value, 6)) / 10:.1f} %"


def _scored_prompt_tokens(run: Run) -> int:
    longest = max(scenario.prompt_tokens for scenario in run.scenarios.values())
    holds = run.header.shape.max_context_tokens
    # Where the model holds too little for both, half of it is for what is forced.
    return longest if holds is None else min(longest, max(holds - TEXT_STEPS, holds // 2))


def _requests(run: Run) -> int:
    return min(REQUESTS, max(scenario.batch_size for scenario in run.scenarios.values()))


def _losses(run: Run, candidate_id: str) -> list[Likeness]:
    """What a candidate loses: by itself, and by its precision if that is less than what runs today has."""
    seen = run.fidelity[candidate_id]
    by_precision = None if _is_as_precise_as_today(run, candidate_id) else seen.full_precision
    return [seen.text] if by_precision is None else [seen.text, by_precision]


def _is_as_precise_as_today(run: Run, candidate_id: str) -> bool:
    """Whether the precision of its reference needs no judgement of its own: it is today's, or none that may lose."""
    entry, seen = run.entry(candidate_id), run.fidelity[candidate_id]
    todays = entry.reference == run.entry(run.incumbent).reference
    return todays or not entry.candidate.lossy or (seen.full_precision is None and seen.lacks is None)


def _is_exact(seen: Fidelity) -> bool:
    noise = 0.0 if seen.rounding is None else seen.rounding.kl_nats
    parts = (seen.text, seen.greedy)
    return all(
        one.first_clear_divergence is None and one.kl_nats <= max(_EXACT_KL_NATS, _ROUNDING * noise) for one in parts
    )
