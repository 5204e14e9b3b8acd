"""What candidates predict beside their reference, on a trained model; and what would prove nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import QuantizedCache
from transformers.utils.import_utils import is_hqq_available

from kvat_core import Plan, Profile, TuneRequest, likeness, tune
from kvat_core.fidelity import MIN_TOP1_AGREEMENT
from kvat_core.likeness import Reference
from kvat_core.schema import Likeness, Objective, PromptSource, Recipe, Scenario
from kvat_engine_transformers import TransformersAdapter, builtin_path
from kvat_engine_transformers.calling import batching

MODEL = "builtin:llama"
PROMPT_TOKENS, STEPS, GREEDY_STEPS = 192, 256, 64
SCENE = Scenario(prompt_tokens=PROMPT_TOKENS, output_tokens=STEPS, batch_size=2)
TEXT = PromptSource(kind="text", value="The quick brown fox jumps over the lazy dog; pack my box with six dozen jugs. ")

Prepared = Callable[..., tuple[TransformersAdapter, Recipe]]
_REFERENCES: dict[str, Reference] = {}


def forced(adapter: TransformersAdapter) -> tuple[Any, Any]:
    prompt = adapter.make_prompt(TEXT, [PROMPT_TOKENS + STEPS] * SCENE.batch_size, 7)
    whole = adapter.token_ids(prompt)
    return whole[:, :PROMPT_TOKENS], whole[:, PROMPT_TOKENS:]


def reference_of(prepared: Prepared, model_id: str) -> Reference:
    adapter, _ = prepared(model_id, SCENE)
    ids, text = forced(adapter)
    predicted, _ = adapter.score(ids, STEPS, text)
    greedy, chosen = adapter.score(ids, GREEDY_STEPS, None)
    noise = likeness.rounding(predicted, adapter.score_at_once(ids, text))
    return Reference(predicted, greedy, chosen, noise)


@pytest.fixture
def reference(prepared: Prepared) -> Reference:
    if MODEL not in _REFERENCES:
        _REFERENCES[MODEL] = reference_of(prepared, MODEL)
    return _REFERENCES[MODEL]


def beside(reference: Reference, adapter: TransformersAdapter) -> tuple[Likeness, Likeness]:
    ids, text = forced(adapter)
    predicted, _ = adapter.score(ids, STEPS, text)
    chosen, _ = adapter.score(ids, GREEDY_STEPS, reference.chosen)
    noise = reference.rounding
    return likeness.compare(reference.text, predicted, noise), likeness.compare(reference.greedy, chosen, noise)


@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "static"},
        {"prefill_chunk": "128"},
        {"cache": "static", "prefill_chunk": "128"},
        {"cache": "paged"},
        {"cache": "paged", "attention": "eager"},
        {"cache": "paged", "block_sharing": "on"},
        {"attention": "eager"},
        {"attention": "sdpa_math"},
        {"grad_mode": "inference_mode", "cache": "static"},
    ],
    ids=lambda settings: " ".join(f"{knob}={value}" for knob, value in settings.items()),
)
def test_what_claims_to_be_exact_chooses_every_token_as_its_reference(
    prepared: Prepared, reference: Reference, settings: dict[str, str]
) -> None:
    adapter, _ = prepared(MODEL, SCENE, **settings)
    text, greedy = beside(reference, adapter)
    assert reference.rounding is not None
    assert reference.rounding.choice_nats < 1e-4
    for part in (text, greedy):
        assert part.first_clear_divergence is None
        assert part.kl_nats < 1e-6


@pytest.mark.uses("paged")
def test_what_a_model_penalises_takes_no_part_in_it(prepared: Prepared, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(builtin_path("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.1, "no_repeat_ngram_size": 3}))
    reference = reference_of(prepared, str(folder))
    assert reference.rounding is not None
    assert reference.rounding.choice_nats < 1e-4
    for settings in ({"cache": "static"}, {"cache": "paged"}):
        for part in beside(reference, prepared(str(folder), SCENE, **settings)[0]):
            assert part.first_clear_divergence is None
            assert part.kl_nats < 1e-6
    text, _ = beside(reference, prepared(str(folder), SCENE, cache="quanto_int2")[0])
    assert text.first_clear_divergence is not None
    assert text.kl_nats > 0.01


@pytest.mark.uses("paged")
def test_a_paged_cache_is_scored_step_by_step_whatever_it_is_timed_with(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = batching.arguments

    def noted(*arguments: Any) -> dict[str, Any]:
        made = real(*arguments)
        seen.append(made["continuous_batching_config"])
        return made

    monkeypatch.setattr(batching, "arguments", noted)
    adapter, _ = prepared(MODEL, Scenario(prompt_tokens=24, output_tokens=4), cache="paged")
    prompt = adapter.make_prompt(TEXT, [24], 7)
    adapter.score(adapter.token_ids(prompt), 4, None)
    adapter.generate(prompt, 4)
    scored, timed = seen
    # On a card both would be decided by the attention, and nothing could be forced in a captured graph.
    assert (any(scored.cuda_graph_booleans), scored.use_async_batching) == (False, False)
    assert scored.page_size == timed.page_size


@pytest.mark.uses("fp8")
def test_what_a_quantised_cache_loses_is_told_apart_by_its_bits(prepared: Prepared, reference: Reference) -> None:
    kl_nats = {}
    for cache in ("fp8", "quanto_int4", "quanto_int2"):
        text, _ = beside(reference, prepared(MODEL, SCENE, cache=cache)[0])
        kl_nats[cache] = text.kl_nats
        assert text.kl_nats > 1e-6, "something is lost"
        assert (text.top1_agreement >= MIN_TOP1_AGREEMENT) <= (cache != "quanto_int2")
    assert kl_nats["quanto_int2"] > 0.01 > kl_nats["quanto_int4"] > kl_nats["fp8"]


@pytest.mark.skipif(not is_hqq_available(), reason="hqq makes processes slow to start: only nox -s newest has it")
def test_the_bits_of_hqq_are_told_apart_as_well(prepared: Prepared, reference: Reference) -> None:
    kl_nats = []
    for bits in (8, 4, 2):
        text, _ = beside(reference, prepared(MODEL, SCENE, cache=f"hqq_int{bits}")[0])
        kl_nats.append(text.kl_nats)
    assert 1e-9 < kl_nats[0] < kl_nats[1] < kl_nats[2]


def in_one_pass(adapter: TransformersAdapter, ids: Any, text: Any) -> Any:
    """A scorer that proves nothing: the cache is filled, and never read."""
    cache = QuantizedCache("quanto", adapter.model.config, nbits=2, axis_key=0, axis_value=0)
    inputs = torch.from_numpy(np.concatenate([ids, text], axis=1)[:, :-1])
    with torch.no_grad():
        output = adapter.model(input_ids=inputs, past_key_values=cache, use_cache=True)
    assert cache.layers[0].get_seq_length() == inputs.shape[1]
    return torch.log_softmax(output.logits[:, -STEPS:].float(), dim=-1).numpy()


def test_a_scorer_of_one_pass_would_find_nothing_lost(prepared: Prepared, reference: Reference) -> None:
    adapter, _ = prepared(MODEL, SCENE, cache="quanto_int2")
    ids, text = forced(adapter)
    planted = likeness.compare(reference.text, in_one_pass(adapter, ids, text), reference.rounding)
    stepwise, _ = beside(reference, adapter)
    assert planted.kl_nats < 1e-6
    assert stepwise.kl_nats > 1e4 * planted.kl_nats


ONE_LOAD = {"attention": "sdpa", "compile": "off", "grad_mode": "no_grad", "prefill_chunk": "off"}


def tuned(out: Path, pinned: dict[str, str], *excluded: tuple[str, str]) -> Plan:
    profile = Profile(
        name="fidelity",
        scenarios=(Scenario(prompt_tokens=PROMPT_TOKENS, output_tokens=8),),
        objective=Objective(ttft=1, decode=1),
        launches=1,
        samples=1,
    )
    request = TuneRequest(
        out=out,
        engine="transformers",
        model=MODEL,
        threads=1,
        profile=profile,
        space="full",
        pinned=pinned,
        excluded=excluded,
    )
    return tune(request).plan


@pytest.mark.slow
def test_less_precision_is_held_against_full_precision(tmp_path: Path) -> None:
    plan = tuned(tmp_path / "out", {**ONE_LOAD, "cache": "dynamic"}, ("dtype", "float16"))
    found = {one.settings["dtype"]: one for one in plan.candidates if one.state == "ok"}
    assert found["float32"].fidelity.verdict == "exact"
    less = found["bfloat16"].fidelity
    assert less.kl_nats == 0.0, "it is its own reference"
    assert less.full_precision_kl_nats is not None
    assert 1e-6 < less.full_precision_kl_nats < 0.01
    assert less.verdict in ("close", "lossy")
    assert found["bfloat16"].eligible == (less.verdict == "close")


@pytest.mark.slow
def test_lost_fidelity_is_not_recommended_unless_it_is_allowed(tmp_path: Path) -> None:
    plan = tuned(
        tmp_path / "out",
        {**ONE_LOAD, "dtype": "float32"},
        *(("cache", name) for name in ("hqq_int8", "hqq_int4", "hqq_int2", "static", "paged", "fp8")),
        ("residual_length", "32"),
        ("group_size", "32"),
    )
    found = {one.settings["cache"]: one for one in plan.candidates if one.state == "ok"}
    assert set(found) == {"dynamic", "quanto_int4", "quanto_int2"}
    lost = found["quanto_int2"]
    assert lost.fidelity.verdict == "lossy"
    assert lost.fidelity.kl_nats is not None
    assert lost.fidelity.kl_nats > 0.01
    assert "; --allow-lossy accepts that" in (lost.reason or "")
    assert found["dynamic"].fidelity.verdict == "exact"
    assert plan.require_winner().settings["cache"] != "quanto_int2"
    assert plan.canary == "clean"
