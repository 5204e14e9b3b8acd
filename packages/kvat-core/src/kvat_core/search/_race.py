"""Race: everybody once, the best in blocks until they are told apart, the last ones against each other once more."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from kvat_core import roofline, scoring
from kvat_core.costs import spent_launches, spent_s
from kvat_core.field import LEAST_FRESH, Field
from kvat_core.run import Run
from kvat_core.schema import Cell, LaunchOrder, Purpose
from kvat_core.search._base import (
    Allowance,
    Search,
    incumbent_first,
    memory_order,
    peaks_of_a_plan,
    unmeasured_peaks,
)
from kvat_core.search._context import context_trials_left, next_context_trial
from kvat_core.search._entrants import (
    LEAST_BLOCKS,
    PILOTS,
    best_of_screening,
    decided,
    feasible,
    finalists,
    first_block,
    least_blocks,
    race_rounds,
    racers,
    rank,
    seen_enough,
    settled,
    survivors,
    unconfirmed,
)

SCREENING_SAMPLES = 1
"""Timed calls per cell in screening, where most of what a launch costs is not the timed call."""
FINALISTS = 3
RUN_OFF_BLOCKS = 6
NOISY_RUN_OFF_BLOCKS = 8
"""Where two launches of one candidate differ by more than `NOISY`."""
NOISY = 0.02
SCREENING_ALLOWANCE = 0.5
"""Share of what the run may take that screening takes at most."""
SMALL_RUN_OFF_SHARE = 0.6
"""Of what the blocks of a small space cost, what its run-off may cost; twice that where the verdict hangs on it."""
LOAD_IN_CELLS = 2
"""Cells that take as long as loading the model, roughly."""


class Race(Search):
    """Stages as in DESIGN §6; how many blocks each candidate gets follows from what was seen."""

    name = "race"

    def next(self, run: Run) -> LaunchOrder | None:
        """See `Search.next`."""
        return (
            self._before_the_blocks(run)
            or self._peak_that_counts(run)
            or self._race(run)
            or self._run_off(run)
            or memory_order(run, peaks_of_a_plan(run))
            or next_context_trial(run)
        )

    def remaining(self, run: Run) -> int:
        """See `Search.remaining`."""
        if self._before_the_blocks(run) is not None:
            pilots = max(0, PILOTS - len(run.ended_launches("pilot")))
            blocks = least_blocks(run) * (1 + racers(run)) + RUN_OFF_BLOCKS * FINALISTS
            return pilots + self._screenings_left(run) + blocks + self._peaks_to_come(run)
        if self._race(run) is not None:
            rounds = list(race_rounds(run))[: least_blocks(run)]
            timing = sum(len(self.outstanding(run, number, self._racing(run, number))) for number in rounds)
            return max(1, timing) + self._run_off_left(run, timing) + self._peaks_to_come(run)
        if self._run_off(run) is not None:
            return max(1, self._run_off_left(run, 0)) + self._peaks_to_come(run)
        return len(peaks_of_a_plan(run)) + context_trials_left(run)

    def _peaks_to_come(self, run: Run) -> int:
        """Launches for memory still to come: until the winner is known, it counts as another one than the incumbent."""
        done = len(run.ended_launches("memory"))
        most = 1 + racers(run) if first_block(run) else feasible(run)
        return max(0, min(most, max(2, len(scoring.memory_matters_to(run)))) - done)

    def _run_off_left(self, run: Run, timing: int) -> int:
        """Launches of the run-off still to come, roughly, with so many of the race before it."""
        if run.header.profile.launches < LEAST_BLOCKS:
            return 0
        expected = RUN_OFF_BLOCKS * FINALISTS
        if not first_block(run):
            blocks = len(run.ended_launches("timing")) + timing
            expected = min(expected, math.ceil(SMALL_RUN_OFF_SHARE * blocks))
        return max(0, expected - len(run.ended_launches("run_off")))

    # Screening

    def _before_the_blocks(self, run: Run) -> LaunchOrder | None:
        """Everybody once, and between them what runs today, so that drift shows."""
        if not first_block(run):
            return None
        if any(order.purpose == "timing" for order in run.launches):
            return None
        if self._has_had_its_share(run):
            return None
        cells = self._next_screened(run)
        pilot = self._pilot(run, self._screened_share(run) if cells else 1.0)
        if pilot is not None or not cells:
            return pilot
        return self._order(run, 0, "screening", cells, SCREENING_SAMPLES)

    def _next_screened(self, run: Run) -> Sequence[Cell]:
        """Cells of the next launch of screening; none when it is over."""
        groups = incumbent_first(self._promising_first(run), run.incumbent)
        return [] if not groups or seen_enough(run) else groups[0]

    def _screenings_left(self, run: Run) -> int:
        """Launches of screening still to come, if it goes on to its end."""
        return len(self.outstanding(run, 0, run.live))

    def _screened_share(self, run: Run) -> float:
        """How much of screening is done, from 0 to 1; of what is to be seen, however often a launch was repeated."""
        left = sum(map(len, self.outstanding(run, 0, run.live)))
        return 1 - left / (len(run.scenarios) * feasible(run))

    def _promising_first(self, run: Run) -> list[list[Cell]]:
        """What screening still lacks: in random order; where it may not come to an end, by what bounds each load."""
        groups = self.outstanding(run, 0, run.live)
        if self._allowance == Allowance():
            return groups
        header = run.header
        ordered = roofline.order(run.candidates, header.shape, header.profile.scenarios, header.ceilings)
        place = {entry.candidate.id: number for number, entry in enumerate(ordered)}
        return sorted(groups, key=lambda cells: min(place[cell.candidate] for cell in cells))

    def _has_had_its_share(self, run: Run) -> bool:
        """Whether screening has taken all that leaves enough for the blocks, where the run may take only so much."""
        allowed = self._allowance
        by_launches = allowed.launches is not None and spent_launches(run) >= SCREENING_ALLOWANCE * allowed.launches
        by_time = allowed.wall_s is not None and spent_s(run) >= SCREENING_ALLOWANCE * allowed.wall_s
        return by_launches or by_time

    def _pilot(self, run: Run, done: float) -> LaunchOrder | None:
        """The next launch of the incumbent alone, when such a share of screening is done."""
        if run.incumbent not in run.live:
            return None
        for number in range(1, PILOTS + 1):
            if done * PILOTS < number:
                return None
            cells = self.outstanding(run, number, [run.incumbent])
            if cells:
                return self._order(run, number, "pilot", cells[0], SCREENING_SAMPLES)
        return None

    # Race

    def _race(self, run: Run) -> LaunchOrder | None:
        for number in race_rounds(run):
            if number in run.after_the_choice:
                return None
            racing = self._racing(run, number)
            if not racing:
                return None
            groups = self.outstanding(run, number, racing)
            if groups:
                first = number == first_block(run)
                ordered = incumbent_first(groups, run.incumbent) if first else groups
                return self._order(run, number, "timing", ordered[0])
        return None

    def _racing(self, run: Run, number: int) -> Collection[str]:
        """Who takes part in a block, by the blocks before it; nobody when enough is known."""
        first = first_block(run)
        if not first:
            return run.live if number < least_blocks(run) else ()
        # Who comes in later, for one that failed, comes in with the next block, never into one that is over; and once a
        # run-off has begun there is no next one.
        begun = {order.round for order in run.launches if order.purpose == "timing"}
        if run.after_the_choice or any(one > number for one in begun):
            return {cell.candidate for order in run.launches if order.round == number for cell in order.cells}
        if number < first + least_blocks(run):
            return best_of_screening(run)
        field = Field(run, until=number - 1)
        if not field.eligible or settled(field, field.epsilon):
            return ()
        return {run.incumbent, *survivors(field)}

    # Run-off

    def _run_off(self, run: Run) -> LaunchOrder | None:
        raced = [order.round for order in run.launches if order.purpose == "timing"]
        if not raced or run.header.profile.launches < LEAST_BLOCKS:
            return None
        last = max(raced)
        chosen = Field(run, until=last)
        if not chosen.eligible:
            return None
        last_ones = finalists(chosen)
        blocks = NOISY_RUN_OFF_BLOCKS if (chosen.noise_floor or 0.0) > NOISY else RUN_OFF_BLOCKS
        # Where what runs today leads there is nothing to be claimed.
        least = 0 if chosen.leader == run.incumbent else LEAST_FRESH
        # Who takes the place of one that failed comes in with the next block: in one that is over it would meet nobody.
        begun = max((order.round for order in run.launches if order.purpose == "run_off"), default=last + 1)
        for block in range(blocks):
            number = last + 1 + block
            if number < begun:
                continue
            so_far = Field(run, until=number - 1) if block % 2 == 0 else None
            if so_far and block >= least and decided(so_far):
                return None
            groups = self.outstanding(run, number, last_ones)
            if groups and so_far and self._too_dear(run, last_ones, block, so_far):
                return None
            if groups:
                mirrored = sorted(groups, key=lambda cells: rank(cells, last_ones), reverse=block % 2 == 1)
                return self._order(run, number, "run_off", mirrored[0])
        return None

    def _too_dear(self, run: Run, names: Sequence[str], done: int, field: Field) -> bool:
        """Whether two more blocks of these candidates, after those done, are out of proportion to a small space.

        By counts, as no time is the same twice, and of what blocks need, however often a launch had to be repeated.
        """
        if first_block(run):
            return False
        blocks: dict[int, set[Cell]] = {}
        for order in run.launches:
            if order.purpose == "timing":
                blocks.setdefault(order.round, set()).update(order.cells)
        run_off = (done + 2) * self._cost({run.original(cell) for name in names for cell in run.cells(name)})
        share = (2 if unconfirmed(field) else 1) * SMALL_RUN_OFF_SHARE
        return run_off > share * sum(map(self._cost, blocks.values()))

    def _cost(self, cells: Collection[Cell]) -> int:
        """Of a block of these cells, roughly, in cells."""
        return LOAD_IN_CELLS * len({self._load_keys[cell] for cell in cells}) + len(cells)

    def _peak_that_counts(self, run: Run) -> LaunchOrder | None:
        """Where memory is part of the score, or limited, the peaks of all that race, after their first block."""
        if not scoring.memory_matters_to(run):
            return None
        first = first_block(run)
        if self.outstanding(run, first, self._racing(run, first)):
            return None
        return memory_order(run, unmeasured_peaks(run, ()))

    def _order(
        self, run: Run, number: int, purpose: Purpose, cells: Sequence[Cell], samples: int | None = None
    ) -> LaunchOrder:
        return LaunchOrder(launch=len(run.launches), round=number, purpose=purpose, cells=tuple(cells), samples=samples)
