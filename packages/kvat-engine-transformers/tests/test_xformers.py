"""xFormers' attention, by a double in plain PyTorch: its kernels run on cuda alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel

from kvat_core.engine import EngineError, Probe
from kvat_core.schema import ModelRef, ModelShape, Plan, PromptSource, Recipe
from kvat_engine_transformers import FallbackWarning, TransformersAdapter, TransformersEngine, builtin_path, load_plan
from kvat_engine_transformers.calling import actions, registration
from kvat_engine_transformers.calling.failures import translated
from kvat_engine_transformers.outputs import snippet
from kvat_engine_transformers.proving import live, observation, proof
from kvat_engine_transformers.settings.knobs import space

DOUBLE = Path(__file__).parent / "xformers_double"
MODULES = ("xformers", "xformers.ops", "kvat_engine_transformers.calling.xformers_attention")
TEXT = PromptSource(kind="text", value="the quick brown fox jumps over the lazy dog")
XFORMERS = {"attention": "xformers"}
CUDA = Probe(device="cuda:0", versions={})

Prepared = Callable[..., tuple[TransformersAdapter, Recipe]]
MakePlan = Callable[..., Plan]


@pytest.fixture(autouse=True, scope="module")
def _double() -> Iterator[None]:
    """The double in place of xFormers, and afterwards nothing of it left."""
    interfaces = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOUBLE))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield
    for name in MODULES:
        sys.modules.pop(name, None)
    for known in interfaces:
        known.pop("xformers", None)


@pytest.fixture
def _offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were a machine on which xFormers has kernels."""
    monkeypatch.setattr("kvat_engine_transformers.settings.knobs._unavailable_packages", lambda probe: {})


def loaded(name: str, attention: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    registration.register(attention)
    model: Any = AutoModelForCausalLM.from_pretrained(builtin_path(name), dtype=dtype, attn_implementation=attention)
    return model.eval()  # type: ignore[no-any-return]


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    arguments = {"do_sample": False, "eos_token_id": None, "disable_compile": True, "output_logits": True, **options}
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, return_dict_in_generate=True, **arguments
    )


def ids_of(model: Any, batch: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, model.config.vocab_size, (batch, tokens), generator=generator)


# What is computed --------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("name", "tokens"), [("llama", 21), ("mistral", 21), ("mistral", 530)])
def test_it_computes_what_sdpa_does(name: str, tokens: int, cache: str, padding: int) -> None:
    """Grouped heads; the longer prompt does not fit into the sliding window."""
    by_sdpa, by_xformers = loaded(name, "sdpa"), loaded(name, "xformers")
    ids = ids_of(by_sdpa, 2, tokens)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    expected = generate(by_sdpa, ids, mask, cache_implementation=cache)
    found = generate(by_xformers, ids, mask, cache_implementation=cache)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_chunked_prompt_sees_its_earlier_chunks(cache: str) -> None:
    by_sdpa, by_xformers = loaded("llama", "sdpa"), loaded("llama", "xformers")
    ids = ids_of(by_sdpa, 1, 45)
    options = {"cache_implementation": cache, "prefill_chunk_size": 16}
    expected = generate(by_sdpa, ids, torch.ones_like(ids), **options)
    found = generate(by_xformers, ids, torch.ones_like(ids), **options)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_in_16_bits_stay_finite(dtype: torch.dtype) -> None:
    """Of a padding token nothing is left to see; the double refuses what would make it infinite."""
    by_sdpa, by_xformers = loaded("llama", "sdpa", dtype), loaded("llama", "xformers", dtype)
    ids = ids_of(by_sdpa, 2, 21)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected, found = generate(by_sdpa, ids, mask), generate(by_xformers, ids, mask)
    torch.testing.assert_close(found.logits[0], expected.logits[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("heads", [1, 6])
def test_a_mask_of_numbers_is_added(heads: int) -> None:
    registration.register("xformers")
    query, (key, value) = torch.randn(2, 6, 3, 16), torch.randn(2, 2, 2, 11, 16)
    module = torch.nn.Identity()
    mask = torch.randn(2, heads, 3, 11)
    mask[..., 4] = torch.finfo(torch.float32).min
    found, _ = AttentionInterface()["xformers"](module, query, key, value, mask, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), mask, scale=0.3
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_without_a_mask_what_is_not_causal_sees_everything() -> None:
    registration.register("xformers")
    query, (key, value) = torch.randn(1, 4, 5, 16), torch.randn(2, 1, 4, 9, 16)
    found, _ = AttentionInterface()["xformers"](torch.nn.Identity(), query, key, value, None, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "indices"])
def test_what_it_does_not_have_is_refused(name: str) -> None:
    registration.register("xformers")
    one = torch.randn(1, 4, 5, 16)
    with pytest.raises(EngineError, match=f"xformers_attention has no {name}, which") as caught, translated():
        AttentionInterface()["xformers"](torch.nn.Identity(), one, one, one, None, **{name: one})
    assert caught.value.kind == "unsupported"


# How it is carried out ---------------------------------------------------------------------------


@pytest.mark.parametrize("model_id", ["builtin:llama", "builtin:mistral", "random:smollm2-135m"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_is_applied_and_proven(prepared: Prepared, model_id: str, cache: str) -> None:
    adapter, _ = prepared(model_id, attention="xformers", cache=cache)
    applied = adapter.applied(adapter.make_prompt(TEXT, (48,), 1))
    assert applied.mismatches == ()
    assert applied.values["attention"] == "xformers"
    assert applied.values["kernels"] == ["XFORMERS"]


@pytest.mark.parametrize(
    ("kernels", "mismatch"),
    [
        ((), "kernel: xFormers was asked for, none of its kernels ran"),
        (("FLASH_ATTENTION", "XFORMERS"), "kernel: xformers calls none of SDPA, FLASH_ATTENTION ran"),
    ],
)
def test_another_kernel_is_caught(prepared: Prepared, kernels: tuple[str, ...], mismatch: str) -> None:
    adapter, ran = prepared("builtin:llama", attention="xformers")
    options = {**actions.arguments(ran), "max_new_tokens": 3}
    seen = observation.observe(adapter.model, adapter.make_prompt(TEXT, (48,), 1), ran, options, live.compiled_graphs())
    assert proof.compare(replace(seen, kernels=kernels), ran).mismatches == (mismatch,)


def test_an_architecture_that_computes_its_attention_itself_is_caught(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers calls it by the name all the same."""
    adapter, _ = prepared("builtin:llama", attention="xformers")
    monkeypatch.setitem(
        AttentionInterface._global_mapping,
        "xformers",
        lambda module, query, *others, **options: (torch.zeros_like(query).transpose(1, 2), None),
    )
    mismatches = adapter.applied(adapter.make_prompt(TEXT, (48,), 1)).mismatches
    assert mismatches == ("kernel: xFormers was asked for, none of its kernels ran",)


def test_without_a_kernel_for_the_call_the_candidate_fails() -> None:
    error = NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n")
    with pytest.raises(EngineError, match="xFormers has no kernel for this model's shapes") as caught, translated():
        raise error
    assert caught.value.kind == "unsupported"


def test_a_package_that_cannot_be_imported_fails_the_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.delitem(sys.modules, "kvat_engine_transformers.calling.xformers_attention", raising=False)
    with pytest.raises(EngineError, match=r"xformers cannot be imported: .*xformers\.ops") as caught:
        registration.register("xformers")
    assert caught.value.kind == "unsupported"


@pytest.mark.usefixtures("_offered")
def test_a_loaded_model_is_switched_to_it_and_back(make_plan: MakePlan) -> None:
    model = loaded("llama", "sdpa")
    ids = ids_of(model, 1, 12)
    seen: list[str] = []
    hook = model.register_forward_pre_hook(lambda *call: seen.append(str(model.config._attn_implementation)))
    expected = load_plan(make_plan({"plain": {}}), model=model).generate(ids, 5)
    found = load_plan(make_plan({"winner": XFORMERS}), model=model).generate(ids, 5)
    hook.remove()
    assert torch.equal(found, expected)
    assert set(seen[len(seen) // 2 :]) == {"xformers"}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.usefixtures("_offered")
def test_where_it_cannot_be_imported_a_plan_goes_on_with_the_next(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.delitem(sys.modules, "kvat_engine_transformers.calling.xformers_attention", raising=False)
    model = loaded("llama", "sdpa")
    planned = load_plan(make_plan({"winner": XFORMERS, "eager": {"attention": "eager"}}), model=model)
    with pytest.warns(FallbackWarning, match="winner failed: xformers cannot be imported: .*; going on with eager"):
        planned.generate(ids_of(model, 1, 12), 3)


# What is handed over -----------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_snippet_carries_the_registration(make_plan: MakePlan, tmp_path: Path, cache: str) -> None:
    plan = make_plan({"winner": {**XFORMERS, "cache": cache}})
    text = snippet.render(plan)
    defined = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert "xformers_attention" in defined
    assert text.index('AttentionInterface.register("xformers"') < text.index("def load(")
    assert "kvat" not in text.partition("import torch")[2].replace("kvat_engine_transformers import builtin_path", "")
    (tmp_path / "handed_over.py").write_text(text, encoding="utf-8")
    asked = "import handed_over, torch; model = handed_over.load()"
    printed = run(tmp_path, f"{asked}; print(handed_over.generate(model, torch.arange(5, 17)[None], 5).tolist())")
    model = loaded("llama", "sdpa")
    expected = generate(model, torch.arange(5, 17)[None], torch.ones(1, 12))
    assert printed == str(expected.sequences[:, :17].tolist())


def test_so_does_one_of_random_weights(make_plan: MakePlan) -> None:
    plan = make_plan({"winner": XFORMERS})
    model = plan.model.model_copy(update={"id": "random:smollm2-135m", "weights": "random"})
    text = snippet.render(plan.model_copy(update={"model": model}))
    ast.parse(text)
    assert text.index('AttentionInterface.register("xformers"') < text.index("def load(")


def test_other_snippets_carry_none(make_plan: MakePlan) -> None:
    assert "xformers" not in snippet.render(make_plan({"winner": {}}))


def run(folder: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(DOUBLE), str(folder)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# What is offered ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded"])
def test_on_cuda_it_is_offered_for_every_dtype_and_cache_but_pages(cache: str, dtype: str) -> None:
    engine, shape = TransformersEngine(), ModelShape(architecture="llama", layers=1, attention=("full",), dtype=dtype)
    settings = {"dtype": dtype, "attention": "xformers", "cache": cache, "compile": "off"}
    assert engine.check(settings, shape, CUDA) is None
    assert engine.check({**settings, "cache": "paged"}, shape, CUDA) is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"model_type": "gemma2"}, "xFormers' attention does not cap logits, as gemma2 does"),
        ({"model_type": "gpt_oss"}, "xFormers' attention does not have the attention sinks of gpt_oss"),
        ({"model_type": "diffllama"}, "diffllama calls attention of its own"),
        ({"model_type": "falcon"}, "does not let the attention of falcon be exchanged"),
    ],
)
def test_an_architecture_that_it_cannot_serve_says_why(
    write_config: Callable[..., Path], changes: dict[str, Any], reason: str | None
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    folder = write_config({"model_type": "llama", **sizes, **heads, **changes})
    shape = TransformersEngine().describe(ModelRef(id=f"random:{folder}"), "cpu", {})
    (attention,) = (knob for knob in space(shape, CUDA, None) if knob.name == "attention")
    value = attention.value("xformers")
    assert value is not None
    assert (value.unavailable is None) if reason is None else (reason in (value.unavailable or ""))
