"""Launches that time nothing: is what a candidate says right, and does a request leave anything behind for the next?

Both load the model several times, one after the other, each in a process of its own. What fails in them is recorded,
never raised, and costs the candidate nothing but the knowledge, unless it is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvat_core import fidelity
from kvat_core.measure.bench import Bench
from kvat_core.measure.messages import Answered, Scored, ScoreTask
from kvat_core.measure.session import make_folder, validated
from kvat_core.measure.supervisor import WorkerFailed
from kvat_core.schema import Canary, Cell, Failed, Failure, Fidelity, Judged, LaunchOrder, Recipe, Scenario

_FORCED, _ANSWERED = -1000, -2000
"""Indices of the prompts of these calls, apart from those that are timed; each further one has one less."""


def judge(order: LaunchOrder, bench: Bench) -> None:
    """Hold a candidate's predictions against those of its reference."""
    cell = order.cells[0]
    bench.announce(f"judging the fidelity of {bench.label(cell)}")
    try:
        found = _fidelity(cell, bench)
    except _CannotBeTold as told:
        bench.record(Judged(launch=order.launch, candidate=cell.candidate, fidelity=None, failure=told.failure))
        return
    bench.record(Judged(launch=order.launch, candidate=cell.candidate, fidelity=found))
    if fidelity.is_broken(found, bench.run.entry(cell.candidate).candidate):
        failure = Failure(kind="wrong_output", phase="fidelity", reason=fidelity.in_words(found))
        bench.record(Failed(launch=order.launch, cell=cell, failure=failure))


def look_for_leaks(order: LaunchOrder, bench: Bench) -> None:
    """Answer a request in a fresh process, and in another one after a longer and after a shorter one."""
    cell = order.cells[0]
    bench.announce(f"looking for what requests leave behind in {bench.label(cell)}")
    usual, longer, shorter = fidelity.canary_lengths(bench.run)
    try:
        (alone,) = _answers(cell, bench, [usual])
        _, after_longer, _, after_shorter = _answers(cell, bench, [longer, usual, shorter, usual])
        again = alone if after_longer == after_shorter == alone else _answers(cell, bench, [usual])[0]
    except _CannotBeTold as told:
        reason = f"{told.failure.kind}, {told.failure.reason}"
        bench.record(Canary(launch=order.launch, candidate=cell.candidate, verdict="undetermined", reason=reason))
        return
    if again != alone:
        reason = "two fresh processes answer the same request differently"
        bench.record(Canary(launch=order.launch, candidate=cell.candidate, verdict="undetermined", reason=reason))
        return
    leaks = [what for what, answer in (("longer", after_longer), ("shorter", after_shorter)) if answer != alone]
    bench.record(Canary(launch=order.launch, candidate=cell.candidate, verdict="leak" if leaks else "clean"))
    if leaks:
        reason = f"a request is answered differently after a {' and after a '.join(leaks)} one"
        failure = Failure(kind="leak", phase="canary", reason=reason)
        bench.record(Failed(launch=order.launch, cell=cell, failure=failure))


class _CannotBeTold(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def _fidelity(cell: Cell, bench: Bench) -> Fidelity:
    own, in_full = bench.references(cell)
    full_precision, lacks = None, None
    if own == in_full:
        _keep(own, None, cell, bench)
    else:
        try:
            _keep(in_full, None, cell, bench)
        except _CannotBeTold as told:
            lacks = f"{told.failure.kind}, {told.failure.reason}"
        full_precision = _keep(own, None if lacks else in_full, cell, bench).text
    scored = _score(bench.recipe_at(cell), cell, bench, against=own)
    if scored.text is None or scored.greedy is None:
        raise _CannotBeTold(Failure(kind="no_output", phase="fidelity", reason="the worker compared nothing"))
    return Fidelity(
        prompt_tokens=Scenario.of_key(cell.scenario).prompt_tokens,
        text=scored.text,
        greedy=scored.greedy,
        rounding=scored.rounding,
        full_precision=full_precision,
        lacks=lacks,
    )


def _keep(reference: Recipe, against: Recipe | None, cell: Cell, bench: Bench) -> Scored:
    """What a reference predicts, scored once per process of the run; it stays in the temporary directory.

    Raises:
        _CannotBeTold: it cannot be scored, now or before.
    """
    known = bench.references_scored.get(reference.key)
    if known is None:
        try:
            known = _score(reference, cell, bench, against=against, keep=True)
        except _CannotBeTold as told:
            known = told.failure
        bench.references_scored[reference.key] = known
    if isinstance(known, Failure):
        raise _CannotBeTold(known)
    return known


def _score(recipe: Recipe, cell: Cell, bench: Bench, *, against: Recipe | None, keep: bool = False) -> Scored:
    scene = Scenario.of_key(cell.scenario)
    own_folder = make_folder(_folder(recipe, bench)) if keep else None
    task = ScoreTask(
        prompt=bench.prompt(scene, round_number=0, index=_FORCED),
        text_steps=fidelity.steps(bench.run),
        greedy_steps=min(fidelity.GREEDY_STEPS, fidelity.steps(bench.run)),
        against=None if against is None else str(_folder(against, bench)),
        keep=None if own_folder is None else str(own_folder),
    )
    session = bench.session(recipe)
    try:
        with session:
            session.start()
            session.load()
            session.prepare(recipe)
            limits = session.compile_limits if recipe.compiles else session.whole_limits
            _, value = session.ask("score", task.model_dump(mode="json"), "fidelity", limits)
            return validated(Scored, value, "fidelity")
    except WorkerFailed as failed:
        raise _CannotBeTold(session.scrubbed(failed.failure)) from failed


def _folder(reference: Recipe, bench: Bench) -> Path:
    return bench.scratch / "references" / reference.key


def _answers(cell: Cell, bench: Bench, lengths: Sequence[int]) -> list[str]:
    """Digests of what one process answers to requests of these lengths, one after the other.

    Raises:
        _CannotBeTold: the process fails.
    """
    recipe = bench.recipe_at(cell)
    longest = Scenario.of_key(cell.scenario)
    session = bench.session(recipe)
    found: list[str] = []
    try:
        with session:
            session.start()
            session.load()
            session.prepare(recipe)
            for tokens in lengths:
                # Of equal length are only the requests that are to be answered alike.
                scene = longest.model_copy(update={"prompt_tokens": tokens})
                arguments = {
                    "prompt": bench.prompt(scene, round_number=0, index=_ANSWERED).model_dump(mode="json"),
                    "max_new_tokens": longest.output_tokens,
                    "longest_tokens": longest.total_tokens,
                }
                limits = session.compile_limits if recipe.compiles else session.whole_limits
                _, value = session.ask("answer", arguments, "canary", limits)
                found.append(validated(Answered, value, "canary").digest)
    except WorkerFailed as failed:
        raise _CannotBeTold(session.scrubbed(failed.failure)) from failed
    return found
