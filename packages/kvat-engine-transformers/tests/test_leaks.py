"""Requests that follow each other, through the very code of the snippet: none leaves anything behind for the next."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.import_utils import is_hqq_available

from kvat_core.engine import Answer
from kvat_core.schema import ModelRef, PromptSource, Scenario, Target
from kvat_engine_transformers import TransformersAdapter
from kvat_engine_transformers.measuring.adapter import digest
from kvat_engine_transformers.settings.knobs import PLAIN
from kvat_engine_transformers.settings.recipes import recipe

MODEL = "builtin:llama"
USUAL, LONGER, SHORTER, OUTPUT = 160, 200, 120, 16
LONGEST = Scenario(prompt_tokens=LONGER, output_tokens=OUTPUT)
TEXT = PromptSource(kind="text", value=Path(__file__).read_text())
"""Long enough to say nothing twice: an answer to what repeats itself depends on the last time alone."""
OTHER = PromptSource(kind="text", value=str(TEXT.value)[::-1])
"""Of the requests of another length: what they leave behind shows where the usual one says something else."""
VALUES: list[dict[str, str]] = [
    {"cache": "dynamic"},
    {"cache": "static"},
    {"cache": "static", "prefill_chunk": "128"},
    {"cache": "dynamic", "prefill_chunk": "128"},
    {"cache": "quanto_int4"},
    {"cache": "quanto_int2"},
    {"cache": "fp8"},
    {"cache": "paged"},
    {"cache": "paged", "block_sharing": "on"},
    *({"cache": f"hqq_int{bits}"} for bits in (8, 4, 2) if is_hqq_available()),
]


def fresh(kind: type[TransformersAdapter], settings: dict[str, str]) -> TransformersAdapter:
    """A model of its own, as in a new process."""
    target = Target(model=ModelRef(id=MODEL), device="cpu", threads=1)
    made = recipe({**PLAIN, "dtype": "float32", "threads": "1", **settings}, LONGEST, target)
    adapter = kind()
    load: Any = made.load
    adapter.load_model(**load)
    adapter.prepare_cache(made)
    return adapter


def answers(adapter: TransformersAdapter, *lengths: int) -> list[Answer]:
    texts = {tokens: TEXT if tokens == USUAL else OTHER for tokens in lengths}
    prompts = (adapter.make_prompt(texts[tokens], [tokens], nonce=tokens) for tokens in lengths)
    return [adapter.answer(prompt, OUTPUT, LONGEST.total_tokens) for prompt in prompts]


def leaks(kind: type[TransformersAdapter], settings: dict[str, str]) -> bool:
    (alone,) = answers(fresh(kind, settings), USUAL)
    _, after_longer, _, after_shorter = answers(fresh(kind, settings), LONGER, USUAL, SHORTER, USUAL)
    return {alone} != {after_longer, after_shorter}


@pytest.mark.parametrize("settings", VALUES, ids=lambda settings: " ".join(f"{k}={v}" for k, v in settings.items()))
def test_no_request_leaves_anything_behind(settings: dict[str, str]) -> None:
    assert not leaks(TransformersAdapter, settings)


def test_a_shared_cache_would_be_noticed() -> None:
    path = Path(__file__).parent / "faulty_engine" / "kvat_faulty_adapters.py"
    spec = importlib.util.spec_from_file_location("kvat_faulty_adapters", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert leaks(module.Sharing, {"cache": "static"})
    assert not leaks(module.Sharing, {"cache": "dynamic"})


@pytest.mark.parametrize("settings", VALUES, ids=lambda settings: " ".join(f"{k}={v}" for k, v in settings.items()))
def test_the_code_that_is_handed_over_generates_what_is_timed(settings: dict[str, str]) -> None:
    adapter = fresh(TransformersAdapter, settings)
    prompt = adapter.make_prompt(TEXT, [LONGER], 5)
    timed = adapter.generate(prompt, OUTPUT).tokens
    assert adapter.answer(prompt, OUTPUT, LONGEST.total_tokens).tokens == digest(timed, prompt)
