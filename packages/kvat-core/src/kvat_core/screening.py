"""Pure: what one launch of each candidate tells before the blocks, compared through what runs today."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from statistics import fmean, stdev

from kvat_core import limits, scoring
from kvat_core.run import Run
from kvat_core.stats import Comparison

LEAST_CONTROLS = 4
"""Launches of what runs today that a straight line of drift is told from chance by."""
LEAST_RACED = 3
"""Candidates whose figures in blocks tell how lucky screening was."""
LEAST_LAUNCHES = 12
"""Of screening, from whose best candidates the tail of the others is estimated."""
LEAST_PER_VALUE = 2
"""Candidates with each value of each knob that are screened in any case: unlike values may lead to unlike speeds."""


def standing(run: Run, names: Iterable[str]) -> dict[str, float]:
    """Log score ÷ that of what runs today of each candidate that was screened, straight drift taken out.

    Without figures of what runs today it is the bare log score, which ranks the same but for the drift.
    """
    today = run.incumbent
    seen = scoring.screened(run, [*names, today])
    # By the order of the launches that count: one that was interrupted takes no part.
    ordered = sorted({launch for one in seen.values() for launch in one.launch.values()})
    place = {launch: rank for rank, launch in enumerate(ordered)}
    controls = sorted((place[seen[today].launch[number]], score) for number, score in seen[today].score.items())
    level, slope = _line(controls) if controls else (0.0, 0.0)
    return {
        name: one.score[number] - level - slope * place[one.launch[number]]
        for name, one in seen.items()
        for number in list(one.score)[:1]
    }


def passed_over(run: Run, winner: Comparison, raced: Mapping[str, float], reference: str) -> dict[str, Comparison]:
    """Candidates that screening has seen and that no block has, against the winner.

    What looks best among many in a single launch was lucky in part, the more so the less the candidates differ. How
    lucky, those tell that were raced because they looked best: by so much more than they have shown since, and with
    such a spread, the others are expected to be worse or better than they looked.

    Args:
        run: the journal so far.
        winner: against the reference.
        raced: log score ÷ that of the reference of each candidate that has blocks.
        reference: what runs today, or another one where that has no figures.
    """
    if not run.before_the_blocks:
        return {}
    seen = standing(run, [name for name in run.live if run.alias_of(name) is None])
    base = 0.0 if reference == run.incumbent else seen.get(reference, 0.0)
    found = {name: ahead - base for name, ahead in seen.items()}
    luck = [found[name] - shown for name, shown in raced.items() if name != reference and name in found]
    rest = {name: ahead for name, ahead in found.items() if name not in raced and name != run.incumbent}
    if len(luck) < LEAST_RACED:
        return {name: Comparison(ahead - winner.mean, None, 0.0, 1) for name, ahead in rest.items()}
    error = math.hypot(stdev(luck) * math.sqrt(1 + 1 / len(luck)), winner.error or 0.0)
    df = len(luck) - 1
    return {name: Comparison(ahead - fmean(luck) - winner.mean, error, df, 1) for name, ahead in rest.items()}


def chance_of_better_unseen(run: Run, by: float) -> float:
    """Probability that a candidate not screened yet is better than the best of those seen that may win, by a log ratio.

    Launches come in random order, so the best launch of all is among those still to come with the share of these;
    by how much it is then better follows an exponential tail, estimated from the launches seen. That is worth nothing
    for values that nobody seen has, so then it is certain.
    """
    names = [name for name in run.live if run.alias_of(name) is None and scoring.may_win(run, name)]
    seen = standing(run, names)
    left = {name for name in names if name not in seen}
    if not left:
        return 0.0
    # Who cannot be chosen is no measure of what is still to be found.
    found = {name: ahead for name, ahead in seen.items() if not limits.apparent_miss(run, name)}
    best = _best_by_launch(run, found)
    if len(best) < LEAST_LAUNCHES or not _every_value_seen(run, found, left):
        return 1.0
    return len(left) / (len(left) + len(found)) * math.exp(-by / _mean_excess(best))


def _best_by_launch(run: Run, found: Mapping[str, float]) -> list[float]:
    best: dict[int, float] = {}
    for name, seen in scoring.screened(run, found).items():
        launch = next(iter(seen.launch.values()))
        best[launch] = max(best.get(launch, -math.inf), found[name])
    return list(best.values())


def _every_value_seen(run: Run, found: Mapping[str, float], left: AbstractSet[str]) -> bool:
    def values(names: Iterable[str]) -> Counter[tuple[str, str]]:
        return Counter(pair for name in names for pair in run.entry(name).candidate.settings.items())

    tried = [
        entry.candidate.id for entry in run.candidates if entry.exclusion is None and entry.candidate.id not in left
    ]
    seen = values(tried)
    return all(seen[value] >= LEAST_PER_VALUE for value in values(left))


def _mean_excess(values: Sequence[float]) -> float:
    """By how much the best third exceeds the next one, on average: a tail is told by what is far out in it."""
    ordered = sorted(values, reverse=True)
    best, limit = ordered[: len(ordered) // 3], ordered[len(ordered) // 3]
    return fmean(best) - limit if best and best[0] > limit else math.inf


def _line(controls: list[tuple[int, float]]) -> tuple[float, float]:
    """Level and slope per launch of what runs today, the slope shrunk by what chance alone makes of it.

    By the positive part of the James-Stein estimator: a slope that is no larger than its error is none, one that is far
    larger stays. A test instead would leave most of a drift in that it cannot be sure of.
    """
    scores = [score for _, score in controls]
    flat = fmean(scores), 0.0
    if len(controls) < LEAST_CONTROLS:
        return flat
    middle = fmean(launch for launch, _ in controls)
    squares = sum((launch - middle) ** 2 for launch, _ in controls)
    slope = sum((launch - middle) * score for launch, score in controls) / squares
    level = flat[0] - slope * middle
    left = sum((score - level - slope * launch) ** 2 for launch, score in controls)
    error2 = left / (len(controls) - 2) / squares
    if slope * slope <= error2:
        return flat
    shrunk = slope * (1 - error2 / (slope * slope))
    return flat[0] - shrunk * middle, shrunk
