"""Pure: who takes part in which stage of a race, and whether enough is known."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from kvat_core import limits, scoring, screening, stats
from kvat_core.field import ALPHA, MIN_DIFFERENCE, Field
from kvat_core.pareto import Objectives, dominates
from kvat_core.run import Run
from kvat_core.schema import Cell
from kvat_core.scoring import may_win

SMALL_SPACE = 24
"""Candidates up to which screening saves nothing: each gets as many blocks as the profile says."""
PILOTS = 4
"""Launches of the incumbent alone that screening is interleaved with."""
RACERS_SHARE = 0.1
LEAST_RACERS, MOST_RACERS = 4, 8
LEAST_BLOCKS, MOST_BLOCKS = 3, 8
"""Of a race, if the profile asks for no more and no less: after the least, somebody may be dropped."""


def feasible(run: Run) -> int:
    """Candidates that are not excluded."""
    return sum(entry.exclusion is None for entry in run.candidates)


def first_block(run: Run) -> int:
    """Number of the first block of the race; 0 in a small space, which has no screening."""
    return 0 if feasible(run) <= SMALL_SPACE else 1 + PILOTS


def racers(run: Run) -> int:
    """How many race beside the incumbent, in a space that is screened."""
    return min(MOST_RACERS, max(LEAST_RACERS, math.ceil(RACERS_SHARE * feasible(run))))


def race_rounds(run: Run) -> range:
    """Numbers of the blocks that a race may have."""
    first = first_block(run)
    return range(first, first + (most_blocks(run) if first else least_blocks(run)))


def least_blocks(run: Run) -> int:
    """Blocks that everybody who races takes part in: as many as the profile has launches."""
    return run.header.profile.launches


def most_blocks(run: Run) -> int:
    """Blocks of a race in a space that is screened; who asks for fewer than three gets those."""
    launches = run.header.profile.launches
    return launches if launches < LEAST_BLOCKS else max(MOST_BLOCKS, launches)


def seen_enough(run: Run) -> bool:
    """Whether what has not been screened is unlikely to hold anything better by more than ε."""
    if run.incumbent not in run.live:
        return False
    controls = scoring.screened(run, [run.incumbent])[run.incumbent].score
    if len(controls) < 2:
        return False
    scores = [score for _, score in sorted(controls.items())]
    noise_floor = stats.launch_spread(scores)
    epsilon = max(MIN_DIFFERENCE, 2 * noise_floor)
    return screening.chance_of_better_unseen(run, math.log1p(epsilon)) <= ALPHA


def best_of_screening(run: Run) -> Collection[str]:
    """Who races: the incumbent, and who looked best in one launch."""
    names = [name for name in run.live if run.alias_of(name) is None and may_win(run, name)]
    seen = screening.standing(run, names)
    others = [name for name in seen if name != run.incumbent]
    # Who seems to miss a limit may only race where too few seem to keep all.
    best = sorted(others, key=lambda name: (limits.apparent_miss(run, name), -seen[name]))[: racers(run)]
    return {run.incumbent, *best}


def survivors(field: Field) -> list[str]:
    """Who is shown neither to be worse than the leader nor to be beaten in everything by somebody.

    Corrected for so many candidates and so many looks (Bonferroni).
    """
    looks = most_blocks(field.run) - least_blocks(field.run) + 1
    rivals = max(1, len(field.eligible) - 1)
    seen = {name: achieved(field, name) for name in field.eligible}

    def is_out(name: str) -> bool:
        high = field.compare(name, field.leader).high(1 - ALPHA / rivals / looks)
        beaten = (dominates(other, seen[name], ALPHA / rivals**2 / looks) for other in seen.values())
        return (high is not None and high < 0) or any(beaten)

    return [name for name in field.eligible if name == field.leader or not is_out(name)]


def achieved(field: Field, name: str) -> Objectives:
    """What a candidate has shown, to be compared in everything."""
    utility = field.utilities[name]
    return Objectives(
        ttft=utility.ttft,
        decode=utility.decode,
        peak_bytes=scoring.own_peak(field.run, name),
        context_tokens=scoring.compared_contexts(field.run).get(name),
    )


def settled(field: Field, margin: float) -> bool:
    """Whether nobody who can still win is likely to beat the leader by more than a margin."""
    return all(
        field.compare(name, field.leader).probability_above(math.log1p(margin)) <= ALPHA
        for name in field.contenders
        if name != field.leader
    )


def decided(field: Field) -> bool:
    """Whether more blocks would hardly change the choice: neither among the rivals, nor between today and the best."""
    today = field.run.incumbent
    if not settled(field, MIN_DIFFERENCE):
        return False
    if field.leader == today or today not in field.utilities:
        return True
    if field.shown_better(field.leader, today):
        return True
    return field.claimed(field.leader, today).probability_above(math.log1p(field.epsilon)) <= ALPHA


def unconfirmed(field: Field) -> bool:
    """Whether the leader seems better than what runs today by more than ε, and is not shown to be."""
    today = field.run.incumbent
    if today not in field.utilities or field.shown_better(field.leader, today):
        return False
    return field.claimed(field.leader, today).mean >= math.log1p(field.epsilon)


def finalists(field: Field) -> list[str]:
    """Leader, runner-up and what runs today."""
    rest = sorted(
        (name for name in field.contenders if name != field.leader), key=lambda name: -field.mean(name, field.leader)
    )
    chosen = [field.leader, *rest[:1], *({field.run.incumbent} & set(field.utilities))]
    return list(dict.fromkeys(chosen))


def rank(cells: Sequence[Cell], finalists: Sequence[str]) -> int:
    """Place of a launch in a block of the run-off: that of the first finalist in it."""
    places = (finalists.index(cell.candidate) for cell in cells if cell.candidate in finalists)
    return min(places, default=len(finalists))
