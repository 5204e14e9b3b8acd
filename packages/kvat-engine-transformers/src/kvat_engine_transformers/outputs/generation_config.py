"""What of a plan's winner `from_pretrained` takes from a model's generation_config.json, and what it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kvat_core.engine import ConfigFile
from kvat_core.errors import UsageError
from kvat_core.schema import ModelRef, Plan, Recipe, Target
from kvat_engine_transformers.settings import knobs, reading
from kvat_engine_transformers.settings.caches import CACHES
from kvat_engine_transformers.settings.recipes import recipe
from kvat_engine_transformers.settings.winner import winners_recipe

FILE = "generation_config.json"

CARRIED = ("use_cache", "cache_implementation", "cache_config", "prefill_chunk_size", "disable_compile")
"""Arguments of `generate` that `GenerationConfig` reads from the file and hands on."""

_BY_ITSELF = CACHES["dynamic"].implementation
"""The cache that needs no word; with one, Transformers refuses calls that bring a cache of their own."""

DECODING = ("do_sample", "num_beams")
"""What is generated is the caller's business; how, is the plan's."""
_LENGTHS = ("max_new_tokens", "max_cache_len")
_REPLACES = (*CARRIED, "max_cache_len", "compile_config")
"""All that the file can say of cache and compilation. Transformers refuses a `compile_config` that is read from it."""

_WHERE = {
    "dtype": "from_pretrained",
    "attn_implementation": "from_pretrained",
    "device_map": "from_pretrained",
    "threads": "torch.set_num_threads",
}


def config_file(plan: Plan, folder: Path) -> ConfigFile:
    """The winner as a generation_config.json.

    Raises:
        UsageError: the winner has settings that this version does not know, or is run by another function.
    """
    wanted = winners_recipe(plan)
    if wanted.call != "generate":
        raise UsageError(f"the winner runs by {wanted.call}, which takes no defaults from {FILE}; apply it as code")
    target = Target(model=ModelRef(id=plan.model.id), device=plan.machine.device)
    plain = recipe(_plain_settings(folder, plan), plan.profile.scenarios[0], target)
    return ConfigFile(
        name=FILE,
        values={name: value for name in CARRIED if (value := wanted.arguments.get(name)) not in (None, _BY_ITSELF)},
        replaces=_REPLACES,
        lost=tuple(_lost(wanted, plain)),
        left=tuple(_left(wanted)),
    )


def _plain_settings(folder: Path, plan: Plan) -> dict[str, str]:
    """What Transformers does by itself with a model of this directory, as far as the directory and the plan tell."""
    stored, today = _stored_dtype(folder), plan.incumbent
    # Where nothing is known, another dtype than the winner's makes it one that has to be asked for.
    unknown = next(name for name in knobs.DTYPES if name != plan.require_winner().settings["dtype"])
    plain = {**knobs.defaults(), "dtype": stored if stored in knobs.DTYPES else unknown}
    # A label names what is not by itself so; attention by itself is eager for a model without SDPA.
    if "attention=" not in today.label:
        plain["attention"] = today.settings.get("attention", plain["attention"])
    return plain


def _stored_dtype(folder: Path) -> str | None:
    """Dtype in which `from_pretrained` loads a model if nobody says otherwise; None = config.json does not tell."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = config.get("dtype", config.get("torch_dtype")) if isinstance(config, dict) else None
    return found if isinstance(found, str) else None


def _lost(wanted: Recipe, plain: Recipe) -> Iterator[str]:
    """What differs from what Transformers does by itself, and has no place in the file."""
    for name, value in _loading(wanted).items():
        if value is not None and value != _loading(plain).get(name):
            yield f"{name}={value}, for {_WHERE.get(name, 'loading')}"
    for name, text in wanted.environment.items():
        if name not in plain.environment:
            yield f"{name}={text}, an environment variable"
    for name, value in wanted.setup.items():
        yield f"{name}={_text(value)}, set after loading"
    for call in wanted.context:
        yield f"{call.name}({', '.join(str(one) for one in call.arguments)}), a context around generate"
    for name, value in wanted.arguments.items():
        if name not in (*CARRIED, *DECODING, *_LENGTHS):
            yield f"{name}={_text(value)}, an argument of generate"


def _loading(one: Recipe) -> dict[str, JsonValue]:
    """Arguments of loading that decide how a model runs, by the names that Transformers has for them."""
    return {
        "dtype": one.load["dtype"],
        "attn_implementation": reading.loaded_attention(one),
        "threads": reading.threads(one),
        "device_map": reading.device_map(one),
    }


def _text(value: JsonValue) -> str:
    return json.dumps(value)


def _left(wanted: Recipe) -> Iterator[str]:
    yield "max_new_tokens stays with each call"
    yield f"{' and '.join(DECODING)} stay with the model and each call; measured was greedy decoding of one beam"
    if wanted.arguments["cache_implementation"] != _BY_ITSELF:
        yield (
            "cache_implementation is to be None in a call that brings a cache of its own, which Transformers refuses "
            "while the file names one"
        )
    if "max_cache_len" in wanted.arguments:
        yield (
            "max_cache_len is left out: generate makes each static cache as long as its call needs, but never shorter "
            "than the longest one of the process before"
        )
