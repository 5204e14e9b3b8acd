"""In the worker: what a prepared recipe predicts, kept as a reference for others or held against one."""

from __future__ import annotations

from pathlib import Path

from kvat_core import likeness
from kvat_core.engine import EngineAdapter, EngineError
from kvat_core.likeness import Floats, Reference
from kvat_core.measure.messages import Scored, ScoreTask
from kvat_core.schema import Likeness


def score(task: ScoreTask, adapter: EngineAdapter) -> Scored:
    """Force the text, then the reference's own choice, and compare; token ids and probabilities stay here.

    Raises:
        EngineError: the adapter cannot force tokens; or of kind wrong_output, what a candidate predicts is no
            probability.
    """
    spec = task.prompt
    lengths = [tokens + task.text_steps for tokens in spec.tokens]
    whole = adapter.token_ids(adapter.make_prompt(spec.source, lengths, spec.nonce))
    prompt, text = whole[:, : -task.text_steps], whole[:, -task.text_steps :]
    predicted, _ = adapter.score(prompt, task.text_steps, text)
    against = None if task.against is None else Reference.load(Path(task.against))
    if task.keep is None:
        assert against is not None, "a candidate is held against something"
        chosen, _ = adapter.score(prompt, task.greedy_steps, against.chosen)
        return Scored(
            text=_compared(against.text, predicted, against),
            greedy=_compared(against.greedy, chosen, against),
            rounding=against.rounding,
        )
    at_once = adapter.score_at_once(prompt, text)
    greedy, tokens = adapter.score(prompt, task.greedy_steps, None)
    if not (likeness.are_numbers(predicted) and likeness.are_numbers(greedy)):
        raise EngineError("invalid_output", "the reference predicts nothing that is a number")
    noise = None if at_once is None or not likeness.are_numbers(at_once) else likeness.rounding(predicted, at_once)
    Reference(predicted, greedy, tokens, noise).save(Path(task.keep))
    return Scored(text=None if against is None else _compared(against.text, predicted, against), rounding=noise)


def _compared(reference: Floats, candidate: Floats, of: Reference) -> Likeness:
    try:
        return likeness.compare(reference, candidate, of.rounding)
    except ValueError as error:
        raise EngineError("wrong_output", str(error)) from error
