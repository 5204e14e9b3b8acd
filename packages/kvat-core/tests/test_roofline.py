"""Bytes and operations against arithmetic by hand, and bounds that no measurement may beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvat_core import roofline
from kvat_core.schema import Candidate, CandidateEntry, Ceiling, Ceilings, Footprint, ModelShape, Scenario

LLAMA_8B = ModelShape(
    architecture="llama",
    layers=32,
    attention=("full",) * 32,
    kv_heads=8,
    head_dim=128,
    attention_heads=32,
    hidden_size=4096,
    mlp_size=14336,
    vocab_size=128256,
    parameters=8_030_261_248,
    step_parameters=8_030_261_248 - 128256 * 4096,
)
BFLOAT16 = Footprint(dtype="bfloat16", element_bytes=2, kv_element_bytes=2)
TINY = ModelShape(
    architecture="llama",
    layers=2,
    attention=("full", "full"),
    kv_heads=1,
    head_dim=4,
    attention_heads=2,
    hidden_size=8,
    vocab_size=16,
    parameters=1000,
    step_parameters=1000,
)
FLOAT32 = Footprint(dtype="float32", element_bytes=4, kv_element_bytes=4)
SCENARIO = Scenario(prompt_tokens=3, output_tokens=3)


def ceilings(**changes: Any) -> Ceilings:
    rate = Ceiling(best=1000.0, median=900.0)
    fields = {
        "read_bytes_per_s": rate,
        "copy_bytes_per_s": rate,
        "gemm_flop_per_s": {"float32": Ceiling(best=10_000.0, median=9000.0)},
        "launch_floor_s": Ceiling(best=1e-6, median=1e-6),
    }
    return Ceilings(**{**fields, **changes})


def sliding(window: int | None) -> ModelShape:
    return TINY.model_copy(update={"attention": ("sliding", "full"), "sliding_window": window})


# Memory


def test_a_token_of_llama_8b_takes_128_kib_in_bfloat16() -> None:
    scenario = Scenario(prompt_tokens=1, output_tokens=2)

    assert roofline.kv_cache_bytes(LLAMA_8B, BFLOAT16, scenario, 1) == 131_072
    assert roofline.kv_cache_bytes(LLAMA_8B, BFLOAT16, scenario, 32_768) == 4_294_967_296


def test_scales_of_a_quantised_cache_are_part_of_its_numbers() -> None:
    # 32 numbers of 4 bits and a scale of 16: 18 bytes.
    quantised = BFLOAT16.model_copy(update={"kv_element_bytes": 18 / 32})

    assert roofline.kv_cache_bytes(LLAMA_8B, quantised, SCENARIO, 1) == 131_072 * 18 // 64


def test_a_cache_has_what_it_reserved_and_a_window_no_more_than_it_sees() -> None:
    reserved = FLOAT32.model_copy(update={"reserved_tokens": 10})
    per_token = 2 * 4 * 4  # keys and values of four float32, one layer

    assert roofline.kv_cache_bytes(TINY, reserved, SCENARIO, 3) == 2 * 10 * per_token
    assert roofline.kv_cache_bytes(sliding(6), reserved, SCENARIO, 3) == (6 + 10) * per_token


def test_the_peak_is_prefill_or_the_last_step_whichever_holds_more() -> None:
    per_token = 2 * 2 * 4 * 4
    wide = FLOAT32.model_copy(update={"prefill_bytes": 10_000, "step_bytes": 7})
    narrow = wide.model_copy(update={"prefill_bytes": 10})

    assert roofline.peak_bytes(TINY, wide, SCENARIO, 5) == 5 + 3 * per_token + 10_000
    assert roofline.peak_bytes(TINY, narrow, SCENARIO, 5) == 5 + 5 * per_token + 7


@pytest.mark.parametrize(
    "shape",
    [
        TINY.model_copy(update={"attention": ("other", "full")}),
        TINY.model_copy(update={"kv_heads": None}),
        sliding(None),
    ],
)
def test_what_a_shape_does_not_tell_is_no_prediction(shape: ModelShape) -> None:
    known = FLOAT32.model_copy(update={"prefill_bytes": 1, "step_bytes": 1})

    assert roofline.peak_bytes(shape, known, SCENARIO, 0) is None
    assert roofline.work(shape, known, SCENARIO) is None
    assert roofline.cannot_fit(shape, known, SCENARIO, 1) is None


def test_activations_that_nobody_verified_are_no_prediction_but_weights_and_cache_count() -> None:
    needed = 1000 * 4 + 5 * 2 * 2 * 4 * 4

    assert roofline.peak_bytes(TINY, FLOAT32, SCENARIO, 0) is None
    assert roofline.least_bytes(TINY, FLOAT32, SCENARIO) == needed
    assert roofline.cannot_fit(TINY, FLOAT32, SCENARIO, round(needed / 1.1) + 1) is None
    assert "needs at least" in str(roofline.cannot_fit(TINY, FLOAT32, SCENARIO, round(needed / 1.1) - 1))


# Operations


def test_operations_of_a_call_by_hand() -> None:
    found = roofline.work(TINY, FLOAT32, SCENARIO)

    assert found is not None
    head, pair = 16 * 8, 4 * 2 * 4
    # Three queries see 1 + 2 + 3 keys in each of two layers; the two steps see 4 + 5.
    assert found.prefill_flops == 2 * (1000 - head) * 3 + 2 * head + pair * 2 * 6
    assert found.step_flops == 2 * 1000 + pair * 2 * 9 / 2
    assert found.prefill_read_bytes == 4000
    assert found.step_read_bytes == 4000 + 2 * 4 * 4 * 2 * 9 / 2


def test_a_window_bounds_what_is_seen() -> None:
    found = roofline.work(sliding(2), FLOAT32, SCENARIO)

    assert found is not None
    # The window of two: 1 + 2 + 2 keys, and then 2 + 2.
    assert found.step_flops == 2 * 1000 + 4 * 2 * 4 * (4 + 9) / 2


def test_of_experts_those_that_are_chosen_count_and_a_batch_reads_more_of_them() -> None:
    shape = TINY.model_copy(update={"experts": 4, "experts_per_token": 1, "expert_parameters": 100})
    one = roofline.work(shape, FLOAT32, SCENARIO)
    two = roofline.work(shape, FLOAT32, SCENARIO.model_copy(update={"batch_size": 2}))

    assert one is not None
    assert two is not None
    cache = 2 * 4 * 4 * 2 * 9 / 2
    assert one.step_read_bytes == 4 * (1000 + 100) + cache
    # The second request chooses another expert in three of four cases.
    assert two.step_read_bytes == pytest.approx(4 * (1000 + 175) + 2 * cache)
    # If it chooses the same one, no more is read: that is what bounds.
    assert two.step_least_bytes == 4 * (1000 + 100) + 2 * cache
    assert two.step_flops == 2 * one.step_flops


def test_decoding_llama_8b_does_about_one_operation_per_byte() -> None:
    found = roofline.work(LLAMA_8B, BFLOAT16, Scenario(prompt_tokens=16, output_tokens=2))

    assert found is not None
    assert found.step_flops / found.step_read_bytes == pytest.approx(1.0, abs=0.01)


@given(prompt=st.integers(1, 500), output=st.integers(2, 50), window=st.integers(1, 600))
def test_a_window_never_needs_more_than_full_attention_and_a_wide_one_as_much(
    prompt: int, output: int, window: int
) -> None:
    scenario = Scenario(prompt_tokens=prompt, output_tokens=output)
    full, cut = (roofline.work(shape, FLOAT32, scenario) for shape in (TINY, sliding(window)))

    assert full is not None
    assert cut is not None
    assert cut.prefill_flops <= full.prefill_flops
    assert cut.step_read_bytes <= full.step_read_bytes
    assert (cut == full) == (window >= scenario.total_tokens - 1)


# Bounds and use


def test_a_call_at_the_bound_uses_all_of_the_ceiling() -> None:
    found = roofline.work(TINY, FLOAT32, SCENARIO)
    assert found is not None
    slow_memory, fast_memory = ceilings(), ceilings(read_bytes_per_s=Ceiling(best=1e9, median=1e9))
    by_memory = roofline.bounds(found, FLOAT32, slow_memory, 1)
    by_arithmetic = roofline.bounds(found, FLOAT32, fast_memory, 1)
    assert by_memory is not None
    assert by_arithmetic is not None

    assert roofline.bandwidth_use(found, FLOAT32, slow_memory, 1, by_memory.decode_tps) == pytest.approx(1.0)
    assert roofline.flop_use(found, FLOAT32, fast_memory, by_arithmetic.ttft_s) == pytest.approx(1.0)


@pytest.mark.parametrize("changes", [{"threads": 2}, {"cache_bytes": 4096}], ids=["threads", "cache"])
def test_a_ceiling_that_is_not_that_of_the_call_says_nothing_of_it(changes: dict[str, int]) -> None:
    found = roofline.work(TINY, FLOAT32, SCENARIO)
    assert found is not None

    assert roofline.bandwidth_use(found, FLOAT32, ceilings(**changes), 1, 1.0) is None


def test_a_dtype_without_a_ceiling_has_no_bound() -> None:
    found = roofline.work(TINY, BFLOAT16, SCENARIO)
    assert found is not None

    assert roofline.bounds(found, BFLOAT16, ceilings(), 1) is None
    assert roofline.flop_use(found, BFLOAT16, ceilings(), 1.0) is None


# Order


@dataclass(frozen=True)
class Entry:
    name: str
    footprint: Footprint | None
    incumbent: bool = False

    def record(self) -> CandidateEntry:
        footprints = {} if self.footprint is None else {SCENARIO.key: self.footprint}
        candidate = Candidate(id=self.name, label=self.name, settings={})
        return CandidateEntry(candidate=candidate, incumbent=self.incumbent, footprints=footprints)


def test_the_incumbent_comes_first_then_what_could_be_fastest_and_what_is_unknown_last() -> None:
    heavy = FLOAT32.model_copy(update={"element_bytes": 8})
    entries = [
        Entry("unknown", None).record(),
        Entry("heavy", heavy).record(),
        Entry("today", heavy, incumbent=True).record(),
        Entry("light", FLOAT32).record(),
        Entry("as light", FLOAT32).record(),
    ]

    found = roofline.order(entries, TINY, [SCENARIO], ceilings())

    assert [entry.candidate.id for entry in found] == ["today", "light", "as light", "heavy", "unknown"]
    assert roofline.order(entries, TINY, [SCENARIO], None)[0].candidate.id == "today"
