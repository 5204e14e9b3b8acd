"""As Race, but screening sees what a sampler of Optuna proposes: for spaces in which everybody is too many."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvat_core import screening
from kvat_core.run import Run
from kvat_core.schema import Cell
from kvat_core.scoring import may_win
from kvat_core.search._base import incumbent_first
from kvat_core.search._race import Race

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

LEAST_SCREENED = 100
SCREENED_SHARE = 0.2
"""Of the space: what screening sees at most, where that is more than `LEAST_SCREENED` candidates."""
PER_LAUNCH = 8
"""Candidates proposed per launch: with more, the model is loaded less often; with fewer, the sampler learns sooner."""
TRIES = 8
"""Questions to the sampler per candidate: of what it proposes, more and more has been seen."""


class Optuna(Race):
    """Screening takes what TPE proposes (Bergstra et al. 2011), until it has seen enough; the rest is as in Race."""

    name = "optuna"

    @classmethod
    def unavailable(cls) -> str | None:
        """See `Search.unavailable`."""
        if importlib.util.find_spec("optuna") is not None:
            return None
        return '--search optuna needs Optuna, which is not installed; pip install "kvat-core[optuna]"'

    def _next_screened(self, run: Run) -> Sequence[Cell]:
        """See `Race._next_screened`; who was proposed comes to an end before anybody else is."""
        if not super()._next_screened(run):
            return ()
        groups = self.outstanding(run, 0, run.live)
        proposed = _proposed(run)
        begun = [unfinished for cells in groups if (unfinished := _of(cells, proposed))]
        if begun:
            return begun[0]
        return self._propose(run, groups) if self._may_propose(run) > 0 else ()

    def _screenings_left(self, run: Run) -> int:
        """See `Race._screenings_left`."""
        unseen = {cell.candidate for cells in self.outstanding(run, 0, run.live) for cell in cells}
        return math.ceil(min(self._may_propose(run), len(unseen)) / PER_LAUNCH)

    def _screened_share(self, run: Run) -> float:
        """See `Race._screened_share`."""
        done = len(_proposed(run))
        return done / (done + max(0, self._may_propose(run))) if done else 0.0

    def _may_propose(self, run: Run) -> int:
        most = max(LEAST_SCREENED, math.ceil(SCREENED_SHARE * sum(one.exclusion is None for one in run.candidates)))
        return most - len(_proposed(run))

    def _propose(self, run: Run, groups: Sequence[Sequence[Cell]]) -> Sequence[Cell]:
        """A candidate, and others that share its load; what runs today comes first of all."""
        group_of = {cell.candidate: cells for cells in groups for cell in cells if may_win(run, cell.candidate)}
        if not group_of:
            return ()  # what is left may only be looked at
        sampler = _Sampler(run, self._seed)
        first = run.incumbent if run.incumbent in group_of else sampler.draw(group_of)
        if first is None:
            first = random.Random(f"{self._seed}/{len(group_of)}").choice(sorted(group_of))
        chosen = [first]
        group = {cell.candidate for cell in group_of[first]} & group_of.keys()
        most = min(PER_LAUNCH, self._may_propose(run))
        while len(chosen) < most and (more := sampler.draw(group - {*chosen}, sharing=group)) is not None:
            chosen.append(more)
        return incumbent_first([_of(group_of[first], chosen)], run.incumbent)[0]


class _Sampler:
    """TPE over the values of all knobs, told of all that screening has seen.

    It is made anew at each question, so that what it says follows from the journal alone.
    """

    def __init__(self, run: Run, seed: int) -> None:
        import optuna

        feasible = [entry.candidate for entry in run.candidates if entry.exclusion is None]
        self._run = run
        self._knobs = tuple(feasible[0].settings)
        self._named = {tuple(one.settings.values()): one.id for one in feasible}
        self._space: dict[str, BaseDistribution] = {
            knob: optuna.distributions.CategoricalDistribution(sorted({one.settings[knob] for one in feasible}))
            for knob in self._knobs
        }
        told = self._trials()
        # Without it, each study is announced on standard error.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=random.Random(f"{seed}/{len(told)}").getrandbits(32))
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._study.add_trials(told)

    def draw(self, among: Collection[str], sharing: Collection[str] = ()) -> str | None:
        """One of some candidates, or None if the sampler proposes none of them.

        Args:
            among: ids of those that are wanted.
            sharing: ids; knobs that have one value in all of these keep it.
        """
        kept = self._common(sharing)
        for _ in range(TRIES if among else 0):
            settings = {**self._study.ask(self._space).params, **kept}
            name = self._named.get(tuple(settings[knob] for knob in self._knobs))
            if name in among:
                return name
        return None

    def _common(self, candidates: Collection[str]) -> Mapping[str, str]:
        settings = [self._run.entry(name).candidate.settings for name in candidates]
        values = {knob: {one[knob] for one in settings} for knob in self._knobs}
        return {knob: one for knob, (one, *others) in values.items() if not others} if settings else {}

    def _trials(self) -> list[FrozenTrial]:
        """What is known of each candidate, as a finished trial; who has failed is a failed one."""
        from optuna.trial import TrialState, create_trial

        run = self._run
        seen = screening.standing(run, _proposed(run) & {*run.live})

        def trial(name: str, **ended: Any) -> FrozenTrial:
            return create_trial(params=dict(run.entry(name).candidate.settings), distributions=self._space, **ended)

        return [
            trial(name, value=seen[name]) if name in seen else trial(name, state=TrialState.FAIL)
            for name in (entry.candidate.id for entry in run.candidates)
            if name in seen or name in run.failures
        ]


def _proposed(run: Run) -> set[str]:
    return {cell.candidate for order in run.launches if order.purpose == "screening" for cell in order.cells}


def _of(cells: Sequence[Cell], candidates: Collection[str]) -> list[Cell]:
    return [cell for cell in cells if cell.candidate in candidates]
