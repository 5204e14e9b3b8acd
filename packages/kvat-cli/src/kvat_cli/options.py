"""Values of options that are more than a word or a number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvat_core.errors import UsageError
from kvat_core.measure.deadlines import Deadlines


def whole_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Numbers above 0, separated by commas; none where the option was not given.

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"{option} takes whole numbers above 0, separated by commas, e.g. 2048,4096; got {text!r}")
    return tuple(map(int, words))


def pairs(option: str, texts: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Knobs with one value each, in the order given.

    Raises:
        UsageError: a text without a knob, an equals sign or a value.
    """
    return tuple(_pair(option, text) for text in texts or ())


def settings(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    """Knobs with one value each.

    Raises:
        UsageError: as for `pairs`, or two different values for one knob.
    """
    chosen: dict[str, str] = {}
    for knob, value in pairs(option, texts):
        if chosen.setdefault(knob, value) != value:
            raise UsageError(f"{option} gives {knob!r} two values, {chosen[knob]!r} and {value!r}; give one")
    return chosen


def deadlines(option: str, texts: Sequence[str] | None) -> Deadlines:
    """The deadlines with some phases' seconds replaced.

    Raises:
        UsageError: an unknown phase, or no number of seconds above 0.
    """
    chosen = {f"{phase.replace('-', '_')}_s": seconds for phase, seconds in settings(option, texts).items()}
    known = [name.removesuffix("_s").replace("_", "-") for name in Deadlines.model_fields]
    for name, seconds in chosen.items():
        if name not in Deadlines.model_fields:
            raise UsageError(f"{option} has no phase {name[:-2].replace('_', '-')!r}; choose one of {', '.join(known)}")
        if not _is_seconds(seconds):
            raise UsageError(f"{option} takes PHASE=SECONDS above 0, e.g. load=600; got {seconds!r}")
    return Deadlines.model_validate(chosen)


def _is_seconds(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _pair(option: str, text: str) -> tuple[str, str]:
    knob, _, value = text.partition("=")
    if not knob or not value:
        raise UsageError(f"{option} takes KNOB=VALUE, e.g. cache=static; got {text!r}")
    return knob, value
