"""Options for the engine alone: known ones pass through untouched, are on record, and decide what may be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from kvat_core.engine import Probe
from kvat_core.errors import UsageError
from kvat_core.fake import FakeEngine
from kvat_core.schema import Header, ModelRef, ModelShape, Recipe, Scenario, Target


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Mapping[str, str]]:
    """The scripted engine with an option, and what it was told of it by whom."""
    heard: dict[str, Mapping[str, str]] = {}
    probe, describe, recipe = FakeEngine.probe, FakeEngine.describe, FakeEngine.recipe

    def probed(engine: FakeEngine, device: str | None, options: Mapping[str, str]) -> Probe:
        heard["probe"] = options
        return probe(engine, device, options)

    def described(engine: FakeEngine, model: ModelRef, device: str, options: Mapping[str, str]) -> ModelShape:
        heard["describe"] = options
        return describe(engine, model, device, options)

    def made(engine: FakeEngine, settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
        heard.setdefault("recipe", target.options)  # the snippet, the last to ask, has them from the plan
        return recipe(engine, settings, scenario, target)

    monkeypatch.setattr(FakeEngine, "options", {"binary": "path of the program"})
    monkeypatch.setattr(FakeEngine, "probe", probed)
    monkeypatch.setattr(FakeEngine, "describe", described)
    monkeypatch.setattr(FakeEngine, "recipe", made)
    return heard


def test_an_option_reaches_the_engine_as_it_is_and_the_record_without_directories(command: Any, told: Any) -> None:
    given = {"binary": "/opt/somebody/program"}
    run = command(engine_options=given)
    plan = run.run().plan
    assert told == {"probe": given, "describe": given, "recipe": given}
    (header, *_) = run.events()
    assert isinstance(header, Header)
    assert header.target.options == plan.engine.options == {"binary": "…/program"}


def test_another_option_is_another_request(command: Any, told: Any) -> None:
    run = command(engine_options={"binary": "one"})
    run.stop(5)
    with pytest.raises(UsageError, match=r"target\.options\.binary was 'one' and is 'two'"):
        run.resume(engine_options={"binary": "two"})


def test_an_option_that_the_engine_does_not_have_names_those_it_has(command: Any, told: Any) -> None:
    with pytest.raises(UsageError, match="engine fake has no option 'path' for --engine-option; choose one of binary"):
        command(engine_options={"path": "x"}).run()


def test_an_engine_without_options_says_so(command: Any) -> None:
    with pytest.raises(UsageError, match="no option 'path' for --engine-option; it has none"):
        command(engine_options={"path": "x"}).run()
