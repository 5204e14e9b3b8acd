"""Presets, user profiles, and their fit to a request and a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from kvat_core import prompts
from kvat_core.errors import UsageError
from kvat_core.profiles import fit, load_profile, presets
from kvat_core.schema import Profile, PromptSource, Scenario

MINIMAL = {"name": "mine", "scenarios": [{"prompt_tokens": 16, "output_tokens": 4}], "objective": {"ttft": 1}}


def keys(profile: Profile) -> list[str]:
    return [scenario.key for scenario in profile.scenarios]


def fitted(profile: Profile, **changes: Any) -> tuple[Profile, tuple[str, ...]]:
    asked = {"contexts": (), "batches": (), "shortest_prompt_tokens": None, "max_context_tokens": None}
    options: dict[str, Any] = {"preset": True, **asked, **changes}
    return fit(profile, **options)


def test_the_presets_are_there_and_their_texts_too() -> None:
    assert list(presets()) == ["chat-agent", "ci-micro", "longform", "offline-batch", "rag"]
    for profile in presets().values():
        assert len(prompts.resolve(profile.prompt).value or "") > 500


def test_offline_work_comes_in_batches_and_asks_for_tokens_per_second() -> None:
    offline = presets()["offline-batch"]
    assert all(scenario.batch_size >= 8 for scenario in offline.scenarios)
    shares = offline.objective.shares()
    assert shares["decode"] > sum(share for metric, share in shares.items() if metric != "decode")
    # Rows times slots: a larger batch of shorter requests asks for as much cache.
    assert len({scenario.batch_size * scenario.total_tokens for scenario in offline.scenarios}) == 1


def test_a_user_profile_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(MINIMAL))
    assert load_profile(str(path)).scenarios == (Scenario(prompt_tokens=16, output_tokens=4),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "top level"),
        (json.dumps({**MINIMAL, "format": 2}), "has format 2, this kvat reads up to 1"),
        (json.dumps({**MINIMAL, "sampels": 3}), "sampels: Extra inputs"),
        (json.dumps({**MINIMAL, "scenarios": []}), "scenarios"),
        (json.dumps({**MINIMAL, "scenarios": [{"prompt_tokens": 1, "output_tokens": 1}]}), "scenarios.0.output_tokens"),
        (json.dumps({**MINIMAL, "objective": {}}), "at least one weight"),
        (json.dumps({**MINIMAL, "name": "../x"}), "name"),
        (json.dumps({**MINIMAL, "objective": {"ttft": math.inf}}), "objective.ttft: Input should be a finite number"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_broken_profile_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_profile(str(path))
    assert "\n" not in str(caught.value)


def test_a_changed_preset_needs_a_name_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    preset = presets()["ci-micro"]
    path.write_text(preset.model_dump_json())
    assert load_profile(str(path)) == preset
    path.write_text(preset.model_copy(update={"samples": 2}).model_dump_json())
    with pytest.raises(UsageError, match="has the name of the preset ci-micro and is another one; rename it"):
        load_profile(str(path))


def test_an_unknown_profile_lists_the_known() -> None:
    known = "chat-agent, ci-micro, longform, offline-batch, rag"
    with pytest.raises(UsageError, match=f"unknown profile 'chat'; use one of {known}"):
        load_profile("chat")
    with pytest.raises(UsageError, match="cannot read profile"):
        load_profile("nowhere.json")


def test_contexts_replace_prompt_lengths_and_keep_the_outputs_in_order() -> None:
    chat = presets()["chat-agent"]
    assert keys(fitted(chat, contexts=(1024, 512))[0]) == ["512+64x1", "1024+256x1"]
    assert keys(fitted(chat, contexts=(100,))[0]) == ["100+64x1"]
    assert keys(fitted(chat, contexts=(1, 2, 3))[0]) == ["1+64x1", "2+64x1", "3+256x1"]


def test_batches_multiply_the_scenarios() -> None:
    assert keys(fitted(presets()["ci-micro"], batches=(4, 1))[0]) == ["128+32x1", "128+32x4"]


def test_a_preset_is_cut_to_the_model_and_says_so() -> None:
    profile, notes = fitted(presets()["longform"], max_context_tokens=4352)
    assert keys(profile) == ["3328+1024x1", "2304+2048x1"]
    assert notes[0] == "scenario 4096+1024x1 was cut to 3328+1024x1: the model holds 4352 tokens"
    assert len(notes) == 2


def test_scenarios_that_a_cut_makes_equal_are_one() -> None:
    profile, _ = fitted(presets()["rag"], max_context_tokens=300)
    assert keys(profile) == ["150+150x1"]
    assert profile.scenarios[0].weight == 1.0


@pytest.mark.parametrize("changes", [{"contexts": (4352,)}, {"preset": False}])
def test_a_length_that_the_user_chose_is_not_cut(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="exceed the model's 4352"):
        fitted(presets()["longform"], max_context_tokens=4352, **changes)


def test_what_a_user_wrote_is_not_in_the_redacted_profile() -> None:
    for kind in ("text", "file"):
        profile = presets()["ci-micro"].model_copy(update={"prompt": PromptSource(kind=kind, value="my secret")})
        assert "secret" not in profile.redacted().model_dump_json()


def test_prompt_sources_that_give_no_text_are_said(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    for source, message in [
        (PromptSource(kind="preset", value="none"), "unknown prompt preset 'none'; use one of chat, documents, story"),
        (PromptSource(kind="file", value=str(tmp_path / "absent")), "prompt file \\(No such file or directory\\)"),
        (PromptSource(kind="file", value=str(empty)), "is empty"),
        (PromptSource(kind="text", value=None), "has no value"),
    ]:
        with pytest.raises(UsageError, match=message):
            prompts.resolve(source)
