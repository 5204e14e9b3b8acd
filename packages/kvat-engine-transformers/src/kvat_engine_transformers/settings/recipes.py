"""From settings to actions: the one function behind both the adapter and the snippet."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from kvat_core.schema import ContextCall, Recipe, Scenario, Target
from kvat_engine_transformers.settings.caches import CACHES
from kvat_engine_transformers.settings.knobs import KERNELS, NO_CHUNKS, OWN_THREADS

WARMUP_EAGER = 2
WARMUP_COMPILED = 5
BATCHING = "continuous_batching_config"
"""Argument of `generate_batch` that says what its pool is like."""
SERVED_IN_BATCHES = ("do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id")
"""Arguments of `generate` about what is generated that mean the same to `generate_batch`."""
PAGE_TOKENS = 256
"""Positions per page of a paged cache: what Transformers takes if nobody says otherwise."""
STEP_TOKENS = 4096
"""Tokens of several prompts that a batch computes at a time; a single longer prompt is not cut."""


def recipe(settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
    """What is done for these settings in this scenario, as data."""
    compiled = settings["compile"] != "off" or settings["attention"] == "flex_attention"
    paged = CACHES[settings["cache"]].implementation is None
    return Recipe(
        environment=_environment(settings),
        load={
            "model_id": target.model.id,
            "dtype": settings["dtype"],
            "device": target.device,
            "attn_backend": "sdpa" if settings["attention"] in KERNELS else settings["attention"],
            "extra": _extra(settings, scenario, target, compiled=compiled),
        },
        context=_contexts(settings),
        call="generate_batch" if paged else "generate",
        arguments={
            # A model's own generation_config may say otherwise: greedy decoding with a cache is what is tuned.
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "max_new_tokens": scenario.output_tokens,
            **(_batching(settings, scenario) if paged else _cache_arguments(settings, scenario, target.device)),
        },
        warmup=WARMUP_COMPILED if compiled else WARMUP_EAGER,
        compiles=compiled,
    )


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    # Offline, because whatever may be fetched has been when the model was described.
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if (threads := _threads(settings)) is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def _extra(settings: Mapping[str, str], scenario: Scenario, target: Target, *, compiled: bool) -> dict[str, JsonValue]:
    # Compiled code outlives the call that made it, and a second length changes what is compiled for the first. So
    # each cell that compiles has a launch, and a compiler's cache, of its own.
    everything: list[JsonValue] = [scenario.key, *(f"{knob}={value}" for knob, value in sorted(settings.items()))]
    return {
        "revision": target.model.revision,
        "threads": _threads(settings),
        **({"device_map": target.options["device_map"]} if "device_map" in target.options else {}),
        "compiled_for": everything if compiled else None,
    }


def _threads(settings: Mapping[str, str]) -> int | None:
    """CPU threads, or None to leave torch its own number."""
    return None if settings["threads"] == OWN_THREADS else int(settings["threads"])


def _contexts(settings: Mapping[str, str]) -> tuple[ContextCall, ...]:
    contexts = []
    if settings["grad_mode"] == "inference_mode":
        contexts.append(ContextCall(name="torch.inference_mode"))
    if kernel := KERNELS.get(settings["attention"]):
        contexts.append(ContextCall(name="torch.nn.attention.sdpa_kernel", arguments=(kernel,)))
    return tuple(contexts)


def _cache_arguments(settings: Mapping[str, str], scenario: Scenario, device: str) -> dict[str, JsonValue]:
    kind = CACHES[settings["cache"]]
    arguments: dict[str, JsonValue] = {"cache_implementation": kind.implementation}
    if kind.quantised:
        grouped = {"q_group_size": settings["group_size"], "residual_length": settings["residual_length"]}
        numbers = {name: int(value) for name, value in grouped.items()} if kind.grouped else {}
        arguments["cache_config"] = {**kind.quantised, **numbers}
    if kind.static:
        arguments |= {"max_cache_len": scenario.total_tokens, **_compile_arguments(settings, device)}
    # A chunk that holds the whole prompt changes nothing, unless the chunk is compiled, which a whole prompt is not.
    chunk = settings["prefill_chunk"]
    cuts = chunk != NO_CHUNKS and (int(chunk) < scenario.prompt_tokens or settings["compile"] != "off")
    # Said in any case, because a model's own generation_config may have chunks.
    return {**arguments, "prefill_chunk_size": int(chunk) if cuts else None}


def _compile_arguments(settings: Mapping[str, str], device: str) -> dict[str, JsonValue]:
    if settings["compile"] == "off":
        # generate compiles a static cache on accelerators unless it is told not to.
        return {"disable_compile": True}
    # A model's own generation_config may disable it.
    arguments: dict[str, JsonValue] = {"disable_compile": False}
    if settings["compile"] == "auto":
        return arguments
    compile_config: dict[str, JsonValue] = {"mode": settings["compile"]}
    if device == "cpu":
        # The only door to compilation on the CPU; without it generate leaves the setting out, with a warning.
        compile_config["_compile_all_devices"] = True
    return {**arguments, "compile_config": compile_config}


def _batching(settings: Mapping[str, str], scenario: Scenario) -> dict[str, JsonValue]:
    """A pool for exactly this batch: left to itself, generate_batch takes nearly all the memory that is free."""
    pages = -(-scenario.total_tokens // PAGE_TOKENS)
    return {
        BATCHING: {
            "page_size": PAGE_TOKENS,
            "num_blocks": pages * scenario.batch_size,
            "max_batch_tokens": max(
                scenario.prompt_tokens, min(scenario.prompt_tokens * scenario.batch_size, STEP_TOKENS)
            ),
            "max_requests_per_batch": scenario.batch_size,
            "safety_margin": 0.0,
            "allow_block_sharing": settings["block_sharing"] == "on",
            "auto_switch_to_flash": False,
        }
    }
