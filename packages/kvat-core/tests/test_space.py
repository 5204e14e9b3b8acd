"""Knobs become candidates; every exclusion has its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from kvat_core.errors import UsageError
from kvat_core.schema import CandidateEntry, Knob, KnobValue
from kvat_core.space import enumerate_candidates

KNOBS = (
    Knob(
        name="cache",
        default="grow",
        values=(
            KnobValue(name="grow", space="safe"),
            KnobValue(name="fixed", space="safe", simplicity=1),
            KnobValue(name="small", space="full", simplicity=2, lossy=True),
            KnobValue(name="odd", space="full", unavailable="needs a card"),
        ),
    ),
    Knob(
        name="graph",
        default="off",
        when={"cache": ("fixed",)},
        values=(
            KnobValue(name="off", space="safe"),
            KnobValue(name="on", space="default", simplicity=3, compiles=True),
        ),
    ),
)


def candidates(space: Any = "safe", **changes: Any) -> list[CandidateEntry]:
    options: dict[str, Any] = {"pinned": {}, "excluded": (), "incumbent": {}, "check": lambda settings: None, **changes}
    return enumerate_candidates(KNOBS, space, **options)


def labels(entries: list[CandidateEntry]) -> list[str]:
    return [entry.candidate.label for entry in entries if entry.exclusion is None]


def test_each_space_contains_the_one_before() -> None:
    assert labels(candidates("safe")) == ["default", "cache=fixed"]
    assert labels(candidates("default")) == ["default", "cache=fixed", "cache=fixed graph=on"]
    assert labels(candidates("full")) == ["default", "cache=fixed", "cache=fixed graph=on", "cache=small"]


def test_an_inactive_knob_makes_no_further_candidate() -> None:
    settings = [entry.candidate.settings for entry in candidates("default")]
    assert {"cache": "grow", "graph": "on"} not in settings
    assert len(settings) == 3


def test_the_incumbent_comes_first_and_is_the_only_one() -> None:
    entries = candidates("default", incumbent={"cache": "fixed"})
    assert entries[0].candidate.settings == {"cache": "fixed", "graph": "off"}
    assert [entry.incumbent for entry in entries] == [True, False, False]


def test_an_unavailable_value_is_excluded_with_its_reason() -> None:
    entry = next(entry for entry in candidates("full") if entry.candidate.settings["cache"] == "odd")
    assert entry.exclusion == "cache=odd: needs a card"


def test_the_engines_reason_is_kept() -> None:
    def check(settings: Mapping[str, str]) -> str | None:
        return "no graphs today" if settings["graph"] == "on" else None

    assert [entry.exclusion for entry in candidates("default", check=check)] == [None, None, "no graphs today"]


def test_a_pinned_value_holds_for_all_whatever_its_space() -> None:
    entries = candidates("safe", pinned={"cache": "small"})
    assert [entry.candidate.settings["cache"] for entry in entries] == ["small"]


def test_lossy_is_what_loses_more_than_the_incumbent() -> None:
    by_label = {entry.candidate.label: entry.candidate.lossy for entry in candidates("full")}
    assert by_label["cache=small"]
    assert not candidates("safe", pinned={"cache": "small"})[0].candidate.lossy


def test_an_excluded_value_is_out_but_not_for_the_incumbent() -> None:
    entries = candidates("full", excluded=[("cache", "fixed"), ("cache", "grow")])
    assert [entry.exclusion for entry in entries if entry.candidate.settings["cache"] == "grow"] == [None]
    assert [entry.exclusion for entry in entries if entry.candidate.settings["cache"] == "fixed"] == [
        "cache=fixed was excluded by request",
        "cache=fixed was excluded by request",
    ]


def test_compilation_and_complexity_are_carried() -> None:
    candidate = candidates("default")[2].candidate
    assert (candidate.compiles, candidate.complexity) == (True, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pinned": {"nope": "x"}}, "unknown knob 'nope'; this engine has cache, graph"),
        ({"excluded": [("cache", "x")]}, "unknown value 'x' of cache; it can be grow, fixed, small, odd"),
        ({"incumbent": {"cache": "odd"}}, "the incumbent .* cannot run here: cache=odd: needs a card"),
        ({"pinned": {"graph": "on"}}, "--set graph=on has no effect on the incumbent: it needs cache in fixed"),
        ({"incumbent": {"graph": "on"}}, "--incumbent graph=on has no effect on the incumbent"),
        ({"incumbent": {"cache": "fixed"}, "pinned": {"cache": "grow"}}, "--incumbent cache=fixed contradicts --set"),
        ({"pinned": {"cache": "fixed"}, "excluded": [("cache", "fixed")]}, "--exclude cache=fixed contradicts --set"),
        (
            {"excluded": [("cache", "fixed"), ("cache", "small")]},
            "no candidate is left .*: --exclude cache=fixed --exclude cache=small takes out all others",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        candidates("full", **changes)
