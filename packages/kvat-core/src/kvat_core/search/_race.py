"""Race: everybody once, the best in blocks until they are told apart, the last ones against each other once more."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from kvat_core import scoring, screening, stats
from kvat_core.costs import Costs, spent_launches, spent_s, wall_s
from kvat_core.decision import decide
from kvat_core.field import ALPHA, LEAST_FRESH, MIN_DIFFERENCE, Field
from kvat_core.run import Run
from kvat_core.schema import Cell, LaunchOrder, Purpose
from kvat_core.scoring import may_win
from kvat_core.search._base import Search, incumbent_first, unmeasured_peaks
from kvat_core.search._context import context_trials_left, next_context_trial

SMALL_SPACE = 24
"""Candidates up to which screening saves nothing: each gets as many blocks as the profile says."""
SCREENING_SAMPLES = 1
"""Timed calls per cell in screening, where most of what a launch costs is not the timed call."""
PILOTS = 4
"""Launches of the incumbent alone that screening is interleaved with."""
RACERS_SHARE = 0.1
LEAST_RACERS, MOST_RACERS = 4, 8
LEAST_BLOCKS, MOST_BLOCKS = 3, 8
"""Of the race, the first of which drops nobody."""
FINALISTS = 3
RUN_OFF_BLOCKS = 6
NOISY_RUN_OFF_BLOCKS = 8
"""Where two launches of one candidate differ by more than `NOISY`."""
NOISY = 0.02
SCREENING_ALLOWANCE = 0.5
"""Share of what the run may take that screening takes at most."""
SMALL_RUN_OFF_SHARE = 0.6
"""Of the time that the blocks of a small space took, what its run-off may take at most."""


class Race(Search):
    """Stages as in DESIGN §6; how many blocks each candidate gets follows from what was seen."""

    name = "race"

    def next(self, run: Run) -> LaunchOrder | None:
        """See `Search.next`."""
        timed = self._before_the_blocks(run) or self._race(run) or self._run_off(run)
        return timed or self._peak(run) or next_context_trial(run)

    def remaining(self, run: Run) -> int:
        """See `Search.remaining`."""
        if self._before_the_blocks(run) is not None:
            pilots = PILOTS - sum(order.purpose == "pilot" for order in run.launches)
            blocks = LEAST_BLOCKS * (1 + _racers(run)) + RUN_OFF_BLOCKS * FINALISTS
            return pilots + len(self.outstanding(run, 0, run.live)) + blocks + 2
        if self._race(run) is not None:
            rounds = list(_race_rounds(run))[: LEAST_BLOCKS if _first_block(run) else None]
            timing = sum(len(self.outstanding(run, number, self._racing(run, number))) for number in rounds)
            return max(1, timing) + self._run_off_left(run, timing) + 2
        if self._run_off(run) is not None:
            return max(1, self._run_off_left(run, 0)) + 2
        return len(self._peaks(run)) + context_trials_left(run)

    def _run_off_left(self, run: Run, timing: int) -> int:
        """Launches of the run-off still to come, roughly, with so many of the race before it."""
        done = [order.purpose for order in run.launches]
        if run.header.profile.launches < LEAST_BLOCKS:
            return 0
        expected = RUN_OFF_BLOCKS * FINALISTS
        if not _first_block(run):
            expected = min(expected, math.ceil(SMALL_RUN_OFF_SHARE * (done.count("timing") + timing)))
        return max(0, expected - done.count("run_off"))

    # Screening

    def _before_the_blocks(self, run: Run) -> LaunchOrder | None:
        """Everybody once, and between them what runs today, so that drift shows."""
        if not _first_block(run):
            return None
        if any(order.purpose == "timing" for order in run.launches):
            return None
        groups = incumbent_first(self.outstanding(run, 0, run.live), run.incumbent)
        if groups and (_seen_enough(run) or self._has_had_its_share(run)):
            groups = []
        pilot = self._pilot(run, len(groups))
        if pilot is not None or not groups:
            return pilot
        return self._order(run, 0, "screening", groups[0], SCREENING_SAMPLES)

    def _has_had_its_share(self, run: Run) -> bool:
        """Whether screening has taken all that leaves enough for the blocks, where the run may take only so much."""
        allowed = self._allowance
        by_launches = allowed.launches is not None and spent_launches(run) >= SCREENING_ALLOWANCE * allowed.launches
        by_time = allowed.wall_s is not None and spent_s(run) >= SCREENING_ALLOWANCE * allowed.wall_s
        return by_launches or by_time

    def _pilot(self, run: Run, left: int) -> LaunchOrder | None:
        """The next launch of the incumbent alone, when so much of screening is done."""
        if run.incumbent not in run.live:
            return None
        done = sum(order.purpose == "screening" for order in run.launches)
        for number in range(1, PILOTS + 1):
            if done * PILOTS < number * (done + left):
                return None
            cells = self.outstanding(run, number, [run.incumbent])
            if cells:
                return self._order(run, number, "pilot", cells[0], SCREENING_SAMPLES)
        return None

    # Race

    def _race(self, run: Run) -> LaunchOrder | None:
        for number in _race_rounds(run):
            racing = self._racing(run, number)
            if not racing:
                return None
            groups = self.outstanding(run, number, racing)
            if groups:
                first = number == _first_block(run)
                ordered = incumbent_first(groups, run.incumbent) if first else groups
                return self._order(run, number, "timing", ordered[0])
        return None

    def _racing(self, run: Run, number: int) -> Collection[str]:
        """Who takes part in a block, by the blocks before it; nobody when enough is known."""
        first = _first_block(run)
        if not first:
            return run.live if number < run.header.profile.launches else ()
        if number < first + LEAST_BLOCKS:
            return _best_of_screening(run)
        field = Field(run, until=number - 1)
        if not field.eligible or _settled(field, field.epsilon):
            return ()
        return {run.incumbent, *_survivors(field)}

    # Run-off

    def _run_off(self, run: Run) -> LaunchOrder | None:
        raced = [order.round for order in run.launches if order.purpose == "timing"]
        if not raced or run.header.profile.launches < LEAST_BLOCKS:
            return None
        last = max(raced)
        chosen = Field(run, until=last)
        if not chosen.eligible:
            return None
        finalists = _finalists(chosen)
        blocks = NOISY_RUN_OFF_BLOCKS if chosen.noise_floor > NOISY else RUN_OFF_BLOCKS
        for block in range(blocks):
            number = last + 1 + block
            if block >= LEAST_FRESH and block % 2 == 0 and _decided(Field(run, until=number - 1)):
                return None
            groups = self.outstanding(run, number, finalists)
            if groups and block % 2 == 0 and self._too_dear(run, groups):
                return None
            if groups:
                mirrored = sorted(groups, key=lambda cells: _rank(cells, finalists), reverse=block % 2 == 1)
                return self._order(run, number, "run_off", mirrored[0])
        return None

    def _too_dear(self, run: Run, groups: Sequence[Sequence[Cell]]) -> bool:
        """Whether two more blocks are out of proportion to a small space."""
        if _first_block(run):
            return False
        more_s = 2 * Costs(run, self._load_keys).seconds(groups)
        took_s = {purpose: wall_s(run, purpose) for purpose in ("run_off", "timing")}
        return took_s["run_off"] + more_s > SMALL_RUN_OFF_SHARE * took_s["timing"]

    def _peaks(self, run: Run) -> list[Cell]:
        decision = decide(run)
        return [] if decision is None else unmeasured_peaks(run, {run.incumbent, decision.winner})

    def _peak(self, run: Run) -> LaunchOrder | None:
        cells = self._peaks(run)
        if not cells:
            return None
        number = 1 + max(order.round for order in run.launches)
        return self._order(run, number, "memory", cells[:1])

    def _order(
        self, run: Run, number: int, purpose: Purpose, cells: Sequence[Cell], samples: int | None = None
    ) -> LaunchOrder:
        return LaunchOrder(launch=len(run.launches), round=number, purpose=purpose, cells=tuple(cells), samples=samples)


def _feasible(run: Run) -> int:
    return sum(entry.exclusion is None for entry in run.candidates)


def _first_block(run: Run) -> int:
    """Number of the first block of the race; 0 in a small space, which has no screening."""
    return 0 if _feasible(run) <= SMALL_SPACE else 1 + PILOTS


def _racers(run: Run) -> int:
    return min(MOST_RACERS, max(LEAST_RACERS, math.ceil(RACERS_SHARE * _feasible(run))))


def _race_rounds(run: Run) -> range:
    first = _first_block(run)
    blocks = MOST_BLOCKS if first else run.header.profile.launches
    return range(first, first + blocks)


def _seen_enough(run: Run) -> bool:
    """Whether what has not been screened is unlikely to hold anything better by more than ε."""
    if run.incumbent not in run.live:
        return False
    controls = scoring.screened(run, [run.incumbent])[run.incumbent].score
    if len(controls) < 2:
        return False
    noise_floor = stats.launch_spread([score for _, score in sorted(controls.items())])
    epsilon = max(MIN_DIFFERENCE, 2 * noise_floor)
    return screening.chance_of_better_unseen(run, math.log1p(epsilon)) <= ALPHA


def _best_of_screening(run: Run) -> Collection[str]:
    names = [name for name in run.live if run.alias_of(name) is None and may_win(run, name)]
    seen = screening.standing(run, names)
    best = sorted((name for name in seen if name != run.incumbent), key=lambda name: -seen[name])[: _racers(run)]
    return {run.incumbent, *best}


def _survivors(field: Field) -> list[str]:
    """Who is not shown to be worse than the leader, corrected for so many candidates and so many looks (Bonferroni)."""
    looks = MOST_BLOCKS - LEAST_BLOCKS + 1
    level = 1 - ALPHA / max(1, len(field.eligible) - 1) / looks
    survivors = []
    for name in field.eligible:
        high = None if name == field.leader else field.compare(name, field.leader).high(level)
        if high is None or high >= 0:
            survivors.append(name)
    return survivors


def _settled(field: Field, margin: float) -> bool:
    """Whether nobody who can still win is likely to beat the leader by more than a margin."""
    return all(
        field.compare(name, field.leader).probability_above(math.log1p(margin)) <= ALPHA
        for name in field.contenders
        if name != field.leader
    )


def _decided(field: Field) -> bool:
    """Whether more blocks would hardly change the choice: neither among the rivals, nor between today and the best."""
    today = field.run.incumbent
    if not _settled(field, MIN_DIFFERENCE):
        return False
    if field.leader == today or today not in field.utilities:
        return True
    if field.shown_better(field.leader, today):
        return True
    return field.claimed(field.leader, today).probability_above(math.log1p(field.epsilon)) <= ALPHA


def _finalists(field: Field) -> list[str]:
    """Leader, runner-up and what runs today."""
    rest = sorted(
        (name for name in field.contenders if name != field.leader), key=lambda name: -field.mean(name, field.leader)
    )
    chosen = [field.leader, *rest[:1], *({field.run.incumbent} & set(field.utilities))]
    return list(dict.fromkeys(chosen))


def _rank(cells: Sequence[Cell], finalists: Sequence[str]) -> int:
    return min(finalists.index(cell.candidate) for cell in cells)
