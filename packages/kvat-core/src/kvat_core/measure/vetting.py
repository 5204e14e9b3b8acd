"""Launches that time nothing: is what a candidate says right, and does a request leave anything behind for the next?

Both load the model several times, one after the other, each in a process of its own. What fails in them is recorded,
never raised, and costs the candidate nothing but the knowledge, unless it is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from kvat_core import fidelity
from kvat_core.engine import Answer
from kvat_core.measure.bench import Bench
from kvat_core.measure.messages import Scored, ScoreTask
from kvat_core.measure.session import Session, make_folder, validated
from kvat_core.measure.supervisor import WorkerFailed
from kvat_core.run import OF_THE_CANDIDATE
from kvat_core.schema import (
    Canary,
    CanaryVerdict,
    Cell,
    Failed,
    Failure,
    Fidelity,
    Judged,
    LaunchOrder,
    PromptSource,
    Recipe,
    Scenario,
)

_Found = TypeVar("_Found")

_FORCED, _ANSWERED, _BEFORE, _INSTEAD = -1000, -2000, -3000, -4000
"""Indices of the prompts of these calls, apart from those that are timed: of what is forced, of the request that is to
be answered alike, and of those before it, which have one content, and then another.

The contents differ everywhere: what is left of a request is invisible to the next one that says the same there.
"""


def judge(order: LaunchOrder, bench: Bench) -> None:
    """Hold a candidate's predictions against those of its reference."""
    cell = order.cells[0]
    bench.announce(f"judging the fidelity of {bench.label(cell)}")
    found, failure = None, None
    try:
        found = _fidelity(cell, bench)
        wrong = fidelity.in_words(found) if fidelity.is_broken(bench.run, cell.candidate, found) else None
    except _CannotBeTold as told:
        failure = told.failure
        wrong = failure.reason if failure.kind == "wrong_output" and not told.of_a_reference else None
    if wrong is not None:
        _fail(order, "wrong_output", "fidelity", wrong, bench)
    bench.record(Judged(launch=order.launch, candidate=cell.candidate, fidelity=found, failure=failure))


def look_for_leaks(order: LaunchOrder, bench: Bench) -> None:
    """Answer a request in a fresh process, and in another one after a longer and after a shorter one."""
    cell = order.cells[0]
    bench.announce(f"looking for what requests leave behind in {bench.label(cell)}")
    try:
        verdict, reason, failure = *_verdict(cell, bench), None
    except _CannotBeTold as told:
        failure = told.failure
        verdict, reason = "undetermined", f"{failure.kind}, {failure.reason}"
    if verdict == "leak":
        _fail(order, "leak", "canary", reason, bench)
    bench.record(Canary(launch=order.launch, candidate=cell.candidate, verdict=verdict, reason=reason, failure=failure))


def _fail(order: LaunchOrder, kind: fidelity.Wrong, phase: str, reason: str, bench: Bench) -> None:
    """On record before what it follows from: whoever is killed between the two has not let the candidate off."""
    failure = Failure(kind=kind, phase=phase, reason=reason)
    bench.record(Failed(launch=order.launch, cell=order.cells[0], failure=failure))


class _CannotBeTold(Exception):
    def __init__(self, failure: Failure, *, of_a_reference: bool = False) -> None:
        super().__init__(failure.reason)
        self.failure = failure
        self.of_a_reference = of_a_reference


def _verdict(cell: Cell, bench: Bench) -> tuple[CanaryVerdict, str]:
    """What came of the requests, and why.

    An answer that depends on the lengths before it alone is no leak: code that was compiled for several lengths rounds
    otherwise than code for one. One that depends on what those requests said is. Where not even two fresh processes
    predict the same, tokens have to do.
    """
    usual, longer, shorter = fidelity.canary_lengths(bench.run)
    alone = _answers(cell, bench, [usual], _BEFORE)
    after = _answers(cell, bench, [longer, usual, shorter, usual], _BEFORE)
    if set(after) == set(alone):
        return "clean", ""
    instead = _answers(cell, bench, [longer, usual, shorter, usual], _INSTEAD)
    if instead == after:
        return "clean", "an answer depends on the lengths of the requests before it, not on what they said"
    # Nobody is accused by what does not even repeat itself.
    again = _answers(cell, bench, [usual], _BEFORE), _answers(cell, bench, [longer, usual, shorter, usual], _BEFORE)
    if again != (alone, after):
        if {one.tokens for one in (*alone, *after, *instead)} == {alone[0].tokens}:
            return "clean", "predictions differ from process to process, the tokens do not"
        return "undetermined", "two fresh processes answer the same request differently"
    changed = [what for what, one in zip(("longer", "shorter"), after, strict=True) if one != alone[0]]
    return "leak", f"a request is answered differently after a {' and after a '.join(changed)} one"


def _answers(cell: Cell, bench: Bench, lengths: Sequence[int], others: int) -> list[Answer]:
    """What one process answers to the request of usual length, each time that it comes.

    Args:
        cell: candidate, and the longest of the requests.
        bench: of the run.
        lengths: of all requests, in order.
        others: index of those of another length.

    Raises:
        _CannotBeTold: the process fails.
    """
    recipe, longest = bench.recipe_at(cell), Scenario.of_key(cell.scenario)
    usual = fidelity.canary_lengths(bench.run)[0]

    def ask(session: Session) -> list[Answer]:
        found = []
        for tokens in lengths:
            scene = longest.model_copy(update={"prompt_tokens": tokens})
            index = _ANSWERED if tokens == usual else others
            arguments = {
                "prompt": bench.prompt(
                    scene, round_number=0, index=index, source=_another_text(bench.source, index)
                ).model_dump(mode="json"),
                "max_new_tokens": longest.output_tokens,
                "longest_tokens": longest.total_tokens,
            }
            limits = session.compile_limits if recipe.compiles else session.whole_limits
            _, value = session.ask("answer", arguments, "canary", limits)
            if tokens == usual:
                found.append(validated(Answer, value, "canary"))
        return found

    return _in_a_fresh_process(recipe, bench, ask)


def _another_text(source: PromptSource, index: int) -> PromptSource:
    """Backwards for the requests before, and from elsewhere in it where they are replaced."""
    text = source.value or ""
    if index != _ANSWERED:
        text = text[::-1]
    if index == _INSTEAD:
        third = len(text) // 3
        text = text[third:] + text[:third]
    return source.model_copy(update={"value": text})


def _fidelity(cell: Cell, bench: Bench) -> Fidelity:
    own, in_full, lacks = bench.references(cell)
    full_precision = None
    if in_full is not None and in_full != own:
        try:
            _keep(in_full, None, cell, bench)
        except _CannotBeTold as told:
            # What may have come from outside is forgiven once, as everywhere.
            tried_before = any(one.candidate == cell.candidate for one in bench.run.judged)
            if told.failure.kind not in OF_THE_CANDIDATE and not tried_before:
                raise
            in_full, lacks = None, f"{told.failure.kind}, {told.failure.reason}"
    if in_full == own:
        _keep(own, None, cell, bench)
    else:
        full_precision = _keep(own, in_full, cell, bench).text
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
    """What a reference predicts, scored once per process of the run and per what it is held against.

    Its predictions stay in the temporary directory.

    Raises:
        _CannotBeTold: it cannot be scored; where only the reference can be to blame, it is not tried again.
    """
    pair = (reference.key, None if against is None else against.key)
    known = bench.references_scored.get(pair)
    if known is None:
        try:
            known = _score(reference, cell, bench, against=against, keep=True)
        except _CannotBeTold as told:
            if told.failure.kind not in OF_THE_CANDIDATE:
                raise _CannotBeTold(told.failure, of_a_reference=True) from told
            known = told.failure
        bench.references_scored[pair] = known
    if isinstance(known, Failure):
        raise _CannotBeTold(known, of_a_reference=True)
    return known


def _score(recipe: Recipe, cell: Cell, bench: Bench, *, against: Recipe | None, keep: bool = False) -> Scored:
    task = ScoreTask(
        prompt=bench.prompt(Scenario.of_key(cell.scenario), round_number=0, index=_FORCED),
        text_steps=fidelity.steps(bench.run),
        greedy_steps=min(fidelity.GREEDY_STEPS, fidelity.steps(bench.run)),
        against=None if against is None else str(_folder(against, bench)),
        keep=str(make_folder(_folder(recipe, bench))) if keep else None,
    )

    def ask(session: Session) -> Scored:
        limits = session.compile_limits if recipe.compiles else session.whole_limits
        _, value = session.ask("score", task.model_dump(mode="json"), "fidelity", limits)
        return validated(Scored, value, "fidelity")

    return _in_a_fresh_process(recipe, bench, ask)


def _in_a_fresh_process(recipe: Recipe, bench: Bench, ask: Callable[[Session], _Found]) -> _Found:
    session = bench.session(recipe)
    try:
        with session:
            session.start()
            session.load()
            session.prepare(recipe)
            found = ask(session)
            session.cleanup()
            return found
    except WorkerFailed as failed:
        raise _CannotBeTold(session.scrubbed(failed.failure)) from failed


def _folder(reference: Recipe, bench: Bench) -> Path:
    return bench.scratch / "references" / reference.key
