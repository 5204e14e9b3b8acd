"""Which candidates each kind of device gets, by name."""

from __future__ import annotations

from typing import Any

import pytest

from kvat_core.engine import Probe, SpaceRequest
from kvat_core.schema import CandidateEntry, ModelShape, Space
from kvat_core.space import enumerate_candidates
from kvat_engine_transformers import TransformersEngine

LLAMA = ModelShape(architecture="llama", layers=2, attention=("full", "full"), dtype="float32")
CPU = Probe(device="cpu", versions={})


def candidates(device: str, space: Space = "safe", dtype: str = "float32", **facts: Any) -> list[CandidateEntry]:
    engine = TransformersEngine()
    shape = ModelShape(architecture="llama", layers=2, attention=("full", "full"), dtype=dtype)
    probe = Probe(device=device, versions={}, facts=facts)
    knobs = engine.space(shape, probe, SpaceRequest(space=space))
    return enumerate_candidates(
        knobs,
        space,
        pinned={},
        excluded=(),
        incumbent={},
        check=lambda settings: engine.check(settings, shape, probe),
    )


def labels(entries: list[CandidateEntry]) -> list[str]:
    return [entry.candidate.label for entry in entries if entry.exclusion is None]


def with_static(*names: str) -> list[str]:
    return [label for name in names for label in (name, f"{name} cache=static".removeprefix("default "))]


SAFE = {
    "cpu": with_static("default", "attention=eager", "attention=sdpa_math"),
    "mps": with_static("default", "attention=eager", "attention=sdpa_math"),
    "cuda:0": with_static(
        "default",
        "attention=eager",
        "attention=sdpa_math",
        "attention=sdpa_flash",
        "attention=sdpa_mem_efficient",
        "attention=sdpa_cudnn",
        "attention=flash_attention_2",
        "attention=flash_attention_3",
        "attention=flash_attention_4",
    ),
}
"""Where a fact is not told, nothing speaks against it: here every package of flash attention is installed."""
SAFE["cuda:0"].remove("attention=sdpa_flash cache=static")


@pytest.mark.parametrize("device", SAFE)
def test_the_safe_space_is_a_named_list(device: str) -> None:
    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    assert labels(candidates(device, dtype=dtype)) == SAFE[device]
    assert 6 <= len(SAFE[device]) <= 18


def test_on_the_cpu_a_checkpoint_of_16_bits_is_tried_in_float32_as_well() -> None:
    found = labels(candidates("cpu", dtype="bfloat16"))
    assert len(found) == 12
    assert "dtype=float32 attention=eager cache=static" in found
    assert not any(entry.candidate.lossy for entry in candidates("cpu", dtype="bfloat16"))


def test_the_safe_space_never_compiles() -> None:
    for device in SAFE:
        assert not any(entry.candidate.compiles for entry in candidates(device))


def test_the_default_space_adds_compilation_but_nothing_lossy() -> None:
    entries = candidates("cpu", "default")
    assert any(entry.candidate.compiles and entry.exclusion is None for entry in entries)
    assert not any(entry.candidate.lossy for entry in entries)
    assert any("grad_mode=inference_mode" in label for label in labels(entries))


def test_only_the_full_space_loses_precision() -> None:
    lossy = [entry.candidate.settings for entry in candidates("cpu", "full") if entry.candidate.lossy]
    kept = [settings for settings in lossy if settings["dtype"] == "float32"]
    assert {settings["dtype"] for settings in lossy} == {"float32", "bfloat16", "float16"}
    quantised = {"quanto_int4", "quanto_int2", "hqq_int8", "hqq_int4", "hqq_int2", "fp8"}
    assert {settings["cache"] for settings in kept} == quantised


def test_every_value_is_listed_as_available_or_with_its_reason() -> None:
    """On the CPU, with all optional packages that can be there."""
    knobs = {knob.name: knob for knob in TransformersEngine().space(LLAMA, CPU, SpaceRequest(space="full"))}
    without = {f"{knob.name}={value.name}" for knob in knobs.values() for value in knob.values if value.unavailable}
    assert without == {
        *(f"attention={name}" for name in ("sdpa_mem_efficient", "sdpa_cudnn", "xformers")),
        *(f"attention=flash_attention_{version}" for version in (2, 3, 4)),
        *(f"cache={name}" for name in ("offloaded", "offloaded_static")),
        *(f"compile={name}" for name in ("auto", "reduce-overhead", "max-autotune-no-cudagraphs")),
    }
    assert len(knobs["cache"].values) == 11
    assert len(knobs["attention"].values) == 11


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"cache": "paged", "attention": "sdpa_math"}, "generate_batch takes no sdpa_math"),
        ({"cache": "paged", "attention": "flex_attention"}, "generate_batch takes no flex_attention"),
        ({"cache": "static", "attention": "flex_attention"}, "too old"),
        ({"cache": "offloaded_static", "attention": "flex_attention"}, "too old"),
        ({"cache": "dynamic", "attention": "flex_attention"}, None),
        ({"cache": "quanto_int4", "group_size": "64"}, "groups of 64 do not divide the 96 keys of a token in a layer"),
        ({"cache": "quanto_int4", "group_size": "32"}, None),
        ({"cache": "fp8", "group_size": "64"}, None),
    ],
)
def test_what_does_not_go_together_says_why(settings: dict[str, str], reason: str | None) -> None:
    plain = {"dtype": "float32", "attention": "sdpa", "compile": "off"}
    shape = LLAMA.model_copy(update={"kv_heads": 3, "head_dim": 32})
    old = Probe(device="cpu", versions={}, facts={"flex_static": "too old"})
    found = TransformersEngine().check({**plain, **settings}, shape, old)
    assert (found is None) if reason is None else (reason in (found or ""))


@pytest.mark.parametrize(
    ("device", "space", "facts", "label", "reason"),
    [
        ("cpu", "safe", {}, "attention=sdpa_cudnn", "PyTorch has this kernel for cuda only"),
        ("mps", "safe", {}, "attention=sdpa_flash", "single fused attention on mps"),
        ("cuda:0", "safe", {"sdpa_flash": "too old"}, "attention=sdpa_flash", "too old"),
        ("cpu", "default", {"compile": "no compiler"}, "cache=static compile=default", "no compiler"),
        ("cpu", "default", {}, "cache=static compile=reduce-overhead", "CUDA graphs, which cpu does not have"),
        ("cpu", "full", {}, "cache=static compile=max-autotune-no-cudagraphs", "is max-autotune on cpu"),
        ("cpu", "full", {"float16": "cannot"}, "dtype=float16", "cannot"),
    ],
)
def test_what_cannot_run_says_why(device: str, space: Space, facts: dict[str, str], label: str, reason: str) -> None:
    entry = next(entry for entry in candidates(device, space, **facts) if entry.candidate.label == label)
    assert reason in (entry.exclusion or "")


def test_a_dtype_whose_weights_do_not_fit_is_excluded() -> None:
    engine = TransformersEngine()
    shape = ModelShape(
        architecture="llama", layers=2, attention=("full", "full"), dtype="bfloat16", weight_bytes=6 << 30
    )
    probe = Probe(device="cpu", versions={}, facts={"free_bytes": 8 << 30})
    settings = {"dtype": "bfloat16", "attention": "sdpa", "cache": "dynamic", "compile": "off", "grad_mode": "no_grad"}
    assert engine.check(settings, shape, probe) is None
    reason = engine.check({**settings, "dtype": "float32"}, shape, probe)
    assert reason == "12.0 GiB of weights in float32 do not fit the 8.0 GiB free"


def test_flash_on_cuda_needs_16_bits() -> None:
    entry = next(e for e in candidates("cuda:0", dtype="float32") if e.candidate.label == "attention=sdpa_flash")
    assert entry.exclusion == "sdpa_flash needs bfloat16 or float16 on cuda"


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ("cache=static", "each step of a static cache"),
        ("cache=offloaded_static", "each step of a static cache"),
        ("prefill_chunk=128", "each chunk of a prompt after its first"),
    ],
)
def test_flash_on_cuda_takes_no_mask(changed: str, what: str) -> None:
    label = f"attention=sdpa_flash {changed}"
    (entry,) = (one for one in candidates("cuda:0", "full", dtype="bfloat16") if one.candidate.label == label)
    assert entry.exclusion == f"PyTorch's flash kernel takes no mask on cuda, and {what} has one"


@pytest.mark.parametrize(("attention", "excluded"), [(("sliding", "sliding"), True), (("sliding", "full"), False)])
def test_a_static_cache_of_windows_alone_is_not_offloaded(attention: tuple[str, ...], excluded: bool) -> None:
    shape = LLAMA.model_copy(update={"attention": attention})
    knobs = TransformersEngine().space(shape, Probe(device="cuda:0", versions={}), SpaceRequest(space="full"))
    cache = next(knob for knob in knobs if knob.name == "cache")
    reasons = {value.name: value.unavailable for value in cache.values}
    told = "Transformers offloads no sliding layer of a static cache, and this model has no others"
    assert reasons["offloaded_static"] == (told if excluded else None)
    assert reasons["offloaded"] is None


@pytest.mark.parametrize(("kv_heads", "excluded"), [(2, True), (8, False)])
def test_the_memory_efficient_kernel_needs_ungrouped_heads(kv_heads: int, excluded: bool) -> None:
    shape = ModelShape(architecture="llama", layers=1, attention=("full",), attention_heads=8, kv_heads=kv_heads)
    settings = {"dtype": "float16", "attention": "sdpa_mem_efficient", "cache": "dynamic"}
    reason = TransformersEngine().check(settings, shape, Probe(device="cuda:0", versions={}))
    assert (reason == "the memory-efficient kernel needs as many KV heads as query heads, llama has fewer") == excluded
