"""Pure: run and decision → the fallbacks of a plan, each derived from candidates that were measured.

They are in order, from what constrains least to what constrains most, and `Plan.resolve` takes the
first that holds and whose candidate can run: after an error, for few requests, by batch size, by
prompt length, without a setting, for less and less memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from kvat_core import fidelity
from kvat_core.decision import Decision, decide
from kvat_core.pareto import CONTEXT_STEP, MEMORY_STEP_BYTES
from kvat_core.run import Run
from kvat_core.schema import CandidateResult, Condition, Ratio, Rule, Scenario, eligible_by_score, needed_bytes


@dataclass(frozen=True)
class _Field:
    """The winner, and whatever else may be recommended."""

    run: Run
    winner: CandidateResult
    ranked: list[CandidateResult]
    """All that are eligible, the best score first."""

    @property
    def memory(self) -> Literal["device", "host"]:
        """The memory whose peaks are compared: the device's, where it has any of its own."""
        return "host" if self.winner.peak_device_bytes is None else "device"

    def peak_bytes(self, candidate: CandidateResult) -> int | None:
        return candidate.peak_host_bytes if self.memory == "host" else candidate.peak_device_bytes

    def best(self, suits: Callable[[CandidateResult], bool]) -> CandidateResult | None:
        """The best other candidate that suits."""
        return next((one for one in self.ranked if one.id != self.winner.id and suits(one)), None)


def derive_rules(
    run: Run, decision: Decision, results: Sequence[CandidateResult], *, unseen: bool = False
) -> tuple[Rule, ...]:
    """The rules of a plan, in order.

    Args:
        run: what was measured.
        decision: what came of it.
        results: every candidate of the run, as the plan shows it.
        unseen: whether they also name those whose output nobody has tried to look at, where that can be done.
    """
    winner = next(result for result in results if result.id == decision.winner)
    tried = run.fidelity_tried
    ranked = [
        one
        for one in eligible_by_score(results)
        if fidelity.is_vouched_for(run, one.id) or (unseen and one.id not in tried)
    ]
    field = _Field(run, winner, ranked)
    ladder = list(_ladder(field))
    return (
        *_after_an_error(field, ladder),
        *_for_few_requests(field),
        *_by_batch(field),
        *_by_prompt(field),
        *_for_longer_prompts(field),
        *_without_a_setting(field),
        *_for_less_memory(field, ladder),
    )


# Memory -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """A candidate and its peak of the memory that is compared."""

    candidate: CandidateResult
    peak_bytes: int


def _ladder(field: _Field) -> Iterator[_Step]:
    """The winner; then, again and again, the best of all that need less than the one before."""
    lowest = field.peak_bytes(field.winner)
    if lowest is None:
        return
    yield _Step(field.winner, lowest)
    for candidate in field.ranked:
        peak = field.peak_bytes(candidate)
        if peak is not None and peak <= lowest - MEMORY_STEP_BYTES:
            lowest = peak
            yield _Step(candidate, peak)


def _for_less_memory(field: _Field, ladder: Sequence[_Step]) -> list[Rule]:
    key = f"{field.memory}_memory_free_below"
    return [_saving(field, {key: needed_bytes(above.peak_bytes)}, above, below) for above, below in pairwise(ladder)]


def _after_an_error(field: _Field, ladder: Sequence[_Step]) -> list[Rule]:
    when = {"error_kind": f"oom_{field.memory}"}
    return [_saving(field, when, above, below) for above, below in pairwise(ladder[:2])]


def _saving(field: _Field, when: Mapping[str, int | str], above: _Step, below: _Step) -> Rule:
    """Instead of one candidate the next that needs less."""
    kind = field.memory
    return Rule(
        when=Condition.model_validate(when),
        use=below.candidate.id,
        because=f"at its peak, {below.candidate.label} takes {_gib(below.peak_bytes)} of {kind} memory, "
        f"{above.candidate.label} {_gib(above.peak_bytes)}",
        evidence={
            f"peak_{kind}_bytes": below.peak_bytes,
            f"instead_of_peak_{kind}_bytes": above.peak_bytes,
            **_score(below.candidate),
        },
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


# Compilation --------------------------------------------------------------------------------------


def _for_few_requests(field: _Field) -> Iterator[Rule]:
    """Without compilation, as long as it is not won back by the requests of one process."""
    compiling = {entry.candidate.id for entry in field.run.candidates if entry.candidate.compiles}
    plain = field.best(lambda one: one.id not in compiling)
    if field.winner.id not in compiling or plain is None:
        return
    compile_s, gain_s = _compile_s(field.winner), _gain_s(field, plain)
    requests = math.ceil(compile_s / gain_s) if gain_s > 0 else 0
    if requests < 2:
        return
    yield Rule(
        when=Condition(requests_below=requests),
        use=plain.id,
        because=f"a new process compiles for {compile_s:.1f} s, which {requests} requests win back against "
        f"{plain.label}",
        evidence={
            "compile_s": compile_s,
            "gain_per_request_s": gain_s,
            "break_even_requests": requests,
            **_score(plain),
        },
    )


def _compile_s(candidate: CandidateResult) -> float:
    """What all its shapes take to compile, one after the other."""
    return sum(one.compile_cost.compile_s for one in candidate.scenarios if one.compile_cost is not None)


def _gain_s(field: _Field, plain: CandidateResult) -> float:
    """What a call of the winner is faster than one of another candidate, on average over the profile's traffic."""
    weights = [scenario.weight for scenario in field.run.scenarios.values()]
    pairs = zip(plain.scenarios, field.winner.scenarios, strict=True)
    gains_s = [slow.e2e_s.median - fast.e2e_s.median for slow, fast in pairs]
    return sum(weight * gain_s for weight, gain_s in zip(weights, gains_s, strict=True)) / sum(weights)


# Bands of traffic ---------------------------------------------------------------------------------


def _by_batch(field: _Field) -> Iterator[Rule]:
    return _by_size(field, lambda scenario: scenario.batch_size, ("batch_above", "batch_at_most"))


def _by_prompt(field: _Field) -> Iterator[Rule]:
    return _by_size(field, lambda scenario: scenario.prompt_tokens, ("prompt_longer_than", "prompt_at_most"))


def _by_size(field: _Field, size: Callable[[Scenario], int], keys: tuple[str, str]) -> Iterator[Rule]:
    """For each band, from above the measured size before up to its own, whoever beats the winner there."""
    scenarios = field.run.scenarios.values()
    sizes = sorted({size(scenario) for scenario in scenarios})
    bands = zip([None, *sizes[:-1]], [*sizes[:-1], None], sizes, strict=True) if len(sizes) > 1 else ()
    for above, at_most, measured in bands:
        better = _better_for(field, tuple(one for one in scenarios if size(one) == measured))
        if better is not None:
            candidate, ratio = better
            yield Rule(
                when=Condition.model_validate({keys[0]: above, keys[1]: at_most}),
                use=candidate.id,
                because=f"for this traffic alone, {candidate.label} scores {ratio.value:.2f} × what the winner does",
                evidence={**_ratio(ratio), **_score(candidate)},
            )


def _better_for(field: _Field, scenarios: tuple[Scenario, ...]) -> tuple[CandidateResult, Ratio] | None:
    """Who is decided to be better for some of the traffic than the winner, if it were what runs today."""
    part = field.run.header.profile.model_copy(update={"scenarios": scenarios})
    asked = field.run.asked(part)
    # There another candidate may stand for the winner.
    decision = decide(field.run.asked(part, incumbent=asked.alias_of(field.winner.id) or field.winner.id))
    if decision is None or decision.verdict != "better" or decision.ratios is None:
        return None
    # Who has no figures for the rest of the traffic is in nobody's plan.
    candidate = field.best(lambda one: one.id == decision.winner)
    return None if candidate is None else (candidate, decision.ratios.score)


def _for_longer_prompts(field: _Field) -> Iterator[Rule]:
    """From where the winner's longest context ends, the best that holds more; from there again, and so on."""
    above = field.winner
    for candidate in field.ranked:
        longest, longer = above.max_context_tokens, candidate.max_context_tokens
        if longest is not None and longer is not None and longer > longest * (1 + CONTEXT_STEP):
            yield Rule(
                when=Condition(prompt_longer_than=longest - 1),
                use=candidate.id,
                because=f"{candidate.label} holds {longer} tokens, {above.label} {longest}",
                evidence={"max_context_tokens": longer, "instead_of_max_context_tokens": longest, **_score(candidate)},
            )
            above = candidate


# Settings -----------------------------------------------------------------------------------------


def _without_a_setting(field: _Field) -> list[Rule]:
    """For each setting of the winner that what runs today has not, the best one without it."""
    today = next(entry.candidate for entry in field.run.candidates if entry.incumbent).settings
    own = [(knob, value) for knob, value in field.winner.settings.items() if today.get(knob) != value]
    return [rule for knob, value in own for rule in _without(field, knob, value)]


def _without(field: _Field, knob: str, value: str) -> Iterator[Rule]:
    other = field.best(lambda one: one.settings.get(knob) != value)
    if other is not None:
        yield Rule(
            when=Condition(feature_missing=f"{knob}={value}"),
            use=other.id,
            because=f"of all without {knob}={value}, {other.label} has the best score",
            evidence=_score(other),
        )


# Evidence -----------------------------------------------------------------------------------------


def _score(candidate: CandidateResult) -> dict[str, int | float]:
    """Of an eligible candidate, which has one: relative to what runs today."""
    return {} if candidate.score is None else {"score": candidate.score.value}


def _ratio(ratio: Ratio) -> dict[str, int | float]:
    ends = {"there_over_winner_low": ratio.low, "there_over_winner_high": ratio.high}
    return {"there_over_winner": ratio.value} | {key: end for key, end in ends.items() if end is not None}
