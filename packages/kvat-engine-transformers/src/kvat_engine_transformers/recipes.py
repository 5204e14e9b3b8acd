"""From settings to actions: the one function behind both the adapter and the snippet."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from kvat_core.schema import ContextCall, Recipe, Scenario, Target
from kvat_engine_transformers.knobs import KERNELS, OWN_THREADS

WARMUP_EAGER = 2
WARMUP_COMPILED = 5


def recipe(settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
    """What is done for these settings in this scenario, as data."""
    compiled = settings["compile"] != "off"
    return Recipe(
        environment=_environment(settings),
        load={
            "model_id": target.model.id,
            "dtype": settings["dtype"],
            "device": target.device,
            "attn_backend": "eager" if settings["attention"] == "eager" else "sdpa",
            "extra": _extra(settings, scenario, target),
        },
        context=_contexts(settings),
        call="generate",
        arguments={
            # A model's own generation_config may say otherwise: greedy decoding with a cache is what is tuned.
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "max_new_tokens": scenario.output_tokens,
            **_cache_arguments(settings, scenario, target.device),
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


def _extra(settings: Mapping[str, str], scenario: Scenario, target: Target) -> dict[str, JsonValue]:
    # Compiled code outlives the call that made it, and a second length changes what is compiled for the first. So
    # each cell that compiles has a launch, and a compiler's cache, of its own.
    everything: list[JsonValue] = [scenario.key, *(f"{knob}={value}" for knob, value in sorted(settings.items()))]
    return {
        "revision": target.model.revision,
        "threads": _threads(settings),
        "compiled_for": None if settings["compile"] == "off" else everything,
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
    if settings["cache"] == "dynamic":
        return {"cache_implementation": "dynamic"}
    slots: dict[str, JsonValue] = {"cache_implementation": "static", "max_cache_len": scenario.total_tokens}
    if settings["compile"] == "off":
        # generate compiles a static cache on accelerators unless it is told not to.
        return {**slots, "disable_compile": True}
    compile_config: dict[str, JsonValue] = {"mode": settings["compile"]}
    if device == "cpu":
        # The only door to compilation on the CPU; without it generate leaves the setting out, with a warning.
        compile_config["_compile_all_devices"] = True
    return {**slots, "compile_config": compile_config}
