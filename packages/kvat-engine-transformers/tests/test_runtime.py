"""A plan at work: who runs a call, what is told, and what is left behind."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BatchEncoding,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import QuantizedLayer

from kvat_core.errors import NothingFeasible, UsageError
from kvat_core.schema import ModelDimensions, ModelShape, Plan, PlanEngine, Rule, needed_bytes
from kvat_engine_transformers import FallbackWarning, PlannedModel, PlanWarning, builtin_path, load_plan, patch_generate
from kvat_engine_transformers.calling import leftovers
from kvat_engine_transformers.calling.kept import NAMES, cache_of
from kvat_engine_transformers.proving.live import compiled_graphs
from kvat_engine_transformers.serving import headroom, runtime
from kvat_engine_transformers.settings.devices import probe_device
from kvat_engine_transformers.settings.knobs import space

README = Path(__file__).parents[1] / "README.md"
GIB = 2**30
PEAKS = {"dynamic": 3 * GIB, "static": 5 * GIB, "eager": 2 * GIB}
IDS = torch.arange(5, 29).reshape(2, 12)
MakePlan = Callable[..., Plan]

CANDIDATES: dict[str, dict[str, str]] = {
    "static": {"cache": "static", "grad_mode": "inference_mode"},
    "dynamic": {},
    "eager": {"attention": "eager"},
}
"""By score, the best first."""


@pytest.fixture
def make_plan(make_plan: MakePlan) -> MakePlan:
    """These candidates and their peaks, unless a test has others."""

    def make(candidates: Mapping[str, Mapping[str, str]] = CANDIDATES, **changes: Any) -> Plan:
        return make_plan(candidates, **{"peaks": PEAKS, **changes})

    return make


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(builtin_path("llama"), dtype=torch.float32)
    return model.eval()


@pytest.fixture(autouse=True)
def _plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for everybody, whatever this machine has."""
    free(monkeypatch, 100 * GIB)


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(headroom, "available_memory_bytes", lambda: count)


def given_cache(options: Mapping[str, Any]) -> Any:
    """What a forward call is given to keep its keys and values in."""
    return next(options[name] for name in NAMES if name in options)


@dataclass
class Spy:
    """Notes how the forward pass was reached, and can make calls fail."""

    model: PreTrainedModel
    caches: list[str] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    inference: list[bool] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Of each forward call; all else is of the first one with each cache."""
    fails: Callable[[str, str], BaseException | None] = lambda cache, attention: None

    def look(self, module: Any, arguments: Any, options: Mapping[str, Any]) -> None:
        cache, attention = given_cache(options), str(self.model.config._attn_implementation)
        if (error := self.fails(type(cache).__name__, attention)) is not None:
            raise error
        self.tokens.append(options["input_ids"].shape[1])
        if cache.get_seq_length() == 0:
            self.caches.append(type(cache).__name__)
            self.slots.append(getattr(cache.layers[0], "max_cache_len", 0) if cache.layers else 0)
            self.attention.append(attention)
            self.threads.append(torch.get_num_threads())
            self.inference.append(torch.is_inference_mode_enabled())


@pytest.fixture
def spy(llama: PreTrainedModel) -> Iterator[Spy]:
    seen = Spy(llama)
    hook = llama.register_forward_pre_hook(seen.look, with_kwargs=True)
    yield seen
    hook.remove()


def full() -> RuntimeError:
    return RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


# Who runs a call ----------------------------------------------------------------------------------


def test_a_call_runs_by_the_winner_for_its_own_length(llama: PreTrainedModel, spy: Spy, make_plan: MakePlan) -> None:
    planned = load_plan(make_plan(), model=llama)
    expected = llama.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    assert torch.equal(planned.generate(IDS, max_new_tokens=5), expected)
    planned.generate(IDS[:, :6], 3)
    assert spy.caches[1:] == ["StaticCache", "StaticCache"]
    # Not that of the longest call before, as Transformers would have it.
    assert spy.slots[1:] == [12 + 5, 6 + 3]
    assert spy.inference[1:] == [True, True]


def test_what_the_caller_asks_for_comes_first(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    output = load_plan(make_plan(), model=llama).generate(
        IDS, 4, attention_mask=mask, do_sample=True, return_dict_in_generate=True, eos_token_id=None
    )
    assert output.sequences.shape == (2, 16)
    assert isinstance(cache_of(output), StaticCache)


def test_so_does_what_the_caller_asks_for_in_a_generation_config(
    llama: PreTrainedModel, spy: Spy, make_plan: MakePlan
) -> None:
    planned, asked = load_plan(make_plan(), model=llama), GenerationConfig(cache_implementation="dynamic")
    planned.generate(IDS, 3, generation_config=asked)
    assert spy.caches == ["DynamicCache"]
    assert spy.inference == [True]
    assert asked.use_cache is None


def test_chunks_that_were_measured_off_stay_off(
    llama: PreTrainedModel, spy: Spy, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.generation_config, "prefill_chunk_size", 4)
    planned = load_plan(make_plan(), model=llama)
    for options in ({}, {"generation_config": GenerationConfig()}):
        planned.generate(IDS, 2, **options)
        assert spy.tokens == [12, 1]
        spy.tokens.clear()
    planned.generate(IDS, 2, generation_config=GenerationConfig(prefill_chunk_size=6))
    assert spy.tokens == [6, 6, 1]


def test_what_is_handed_back_can_be_changed_in_place(llama: PreTrainedModel, spy: Spy, make_plan: MakePlan) -> None:
    planned = load_plan(make_plan(), model=llama)
    planned.generate(IDS, 3)[:, 0] = 0
    with patch_generate(llama, make_plan()):
        llama.generate(IDS, max_new_tokens=3)[:, 0] = 0
    assert spy.inference == [True, True]
    output = planned.generate(IDS, 3, return_dict_in_generate=True)
    output.sequences[:, 0] = 0
    cache_of(output).layers[0].keys.zero_()


@pytest.mark.parametrize(
    ("rule", "shape", "requests"),
    [
        ({"prompt_longer_than": 11}, (2, 12), None),
        ({"batch_above": 1}, (2, 12), None),
        ({"requests_below": 5}, (2, 12), 4),
    ],
)
def test_rules_are_followed_live(
    llama: PreTrainedModel,
    spy: Spy,
    rule: dict[str, int],
    shape: tuple[int, int],
    requests: int | None,
    make_plan: MakePlan,
) -> None:
    rules = (Rule.model_validate({"when": rule, "use": "dynamic", "because": "of a test"}),)
    planned = load_plan(make_plan(rules=rules), model=llama, requests=requests)
    planned.generate(IDS, 2)
    assert spy.caches == ["DynamicCache"]
    planned = load_plan(make_plan(rules=rules), model=llama)
    planned.generate(IDS[:1, :8], 2)
    assert spy.caches == ["DynamicCache", "StaticCache"]


def test_attention_and_threads_are_switched_for_a_call_and_put_back(
    llama: PreTrainedModel, spy: Spy, make_plan: MakePlan
) -> None:
    before = torch.get_num_threads()
    planned = load_plan(make_plan({"eager": {"attention": "eager", "threads": "3"}}), model=llama)
    planned.generate(IDS, 2)
    assert (spy.attention, spy.threads) == (["eager"], [3])
    assert (llama.config._attn_implementation, torch.get_num_threads()) == ("sdpa", before)


def test_another_dtype_is_no_choice_for_a_loaded_model(llama: PreTrainedModel, spy: Spy, make_plan: MakePlan) -> None:
    candidates = {"half": {"dtype": "bfloat16", "cache": "static"}, "eager": CANDIDATES["eager"]}
    with pytest.warns(
        FallbackWarning, match=r"^half cannot run here: dtype=bfloat16 \(the model is loaded in float32\)"
    ):
        planned = load_plan(make_plan(candidates), model=llama)
    assert planned.choose(prompt_tokens=12).id == "eager"
    planned.generate(IDS, 2)
    assert spy.attention == ["eager"]


def test_what_the_probe_says_cannot_run_is_no_choice(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    candidates = {"flash": {"attention": "flash_attention_2"}, "dynamic": CANDIDATES["dynamic"]}
    with pytest.warns(FallbackWarning, match="flash cannot run here: attention=flash_attention_2"):
        planned = load_plan(make_plan(candidates), model=llama)
    assert planned.choose(prompt_tokens=12).id == "dynamic"


@pytest.mark.uses("paged")
def test_a_batch_by_generate_batch_has_the_rows_of_generate(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    planned = load_plan(make_plan({"paged": {"cache": "paged"}}), model=llama)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "eos_token_id": None, "max_new_tokens": 5}
    expected = llama.generate(input_ids=IDS, do_sample=False, **options)
    assert torch.equal(planned.generate(IDS, **options), expected)
    by_beams = llama.generate(IDS, max_new_tokens=5, num_beams=2, do_sample=False)
    with pytest.warns(PlanWarning, match="no candidate can serve the call: generate_batch takes no num_beams"):
        assert torch.equal(planned.generate(IDS, 5, num_beams=2), by_beams)


@pytest.mark.uses("paged")
def test_a_batch_by_generate_batch_is_sampled_as_generate_does(
    llama: PreTrainedModel, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes one of the 50 likeliest tokens where nobody says otherwise."""
    own = {**llama.generation_config.to_dict(), "do_sample": True, "temperature": 100.0, "top_k": None}
    monkeypatch.setattr(llama, "generation_config", GenerationConfig(**own))
    likeliest = llama(IDS[:1]).logits[0, -1].topk(50).indices
    torch.manual_seed(0)
    with patch_generate(llama, make_plan({"paged": {"cache": "paged"}})):
        tokens = llama.generate(IDS[:1].repeat(32, 1), max_new_tokens=2)
    assert torch.isin(tokens[:, 12], likeliest).all()


@pytest.mark.uses("paged")
@pytest.mark.parametrize("options", [{}, {"top_k": 5, "temperature": 0.5}, {"top_k": None, "top_p": 0.5}], ids=str)
def test_a_batch_samples_from_what_generate_samples_from(
    llama: PreTrainedModel,
    make_plan: MakePlan,
    processors_of: Callable[[Any], list[Any]],
    options: dict[str, Any],
) -> None:
    seen = processors_of(llama)
    llama.generate(IDS, max_new_tokens=2, do_sample=True, **options)
    planned = load_plan(make_plan({"paged": {"cache": "paged"}}), model=llama)
    planned.generate(IDS, 2, do_sample=True, **options)
    by_generate, *by_batch = seen
    assert by_generate
    assert by_batch
    assert all(one == by_generate for one in by_batch)


@pytest.mark.uses("paged")
def test_what_ran_out_of_memory_is_told_and_not_who_could_not_begin(
    llama: PreTrainedModel, spy: Spy, make_plan: MakePlan
) -> None:
    plan = make_plan({"fixed": {"cache": "static"}, "pages": {"cache": "paged"}})
    spy.fails = lambda cache, attention: full() if cache == "StaticCache" else None
    with patch_generate(llama, plan), pytest.warns(FallbackWarning), pytest.raises(RuntimeError, match="allocate"):
        llama.generate(IDS, max_new_tokens=3, num_beams=2)


@pytest.mark.parametrize("cache", ["dynamic", "static", "paged"])
def test_padding_without_a_mask_is_padding(llama: PreTrainedModel, make_plan: MakePlan, cache: str) -> None:
    padded = IDS.clone()
    padded[0, :4] = llama.generation_config.pad_token_id
    options = {"max_new_tokens": 5, "eos_token_id": None}
    expected = llama.generate(padded, **options)
    assert not torch.equal(expected, llama.generate(padded, attention_mask=torch.ones_like(padded), **options))
    plan = make_plan({"winner": {"cache": cache}})
    with patch_generate(llama, plan):
        assert torch.equal(llama.generate(padded, **options), expected)
    assert torch.equal(load_plan(plan, model=llama).generate(padded, **options), expected)


def here() -> list[dict[str, str]]:
    """Each value that can run here and compiles nothing, with what else it takes to be in effect."""
    shape = ModelShape(architecture="llama", layers=3, attention=("full",) * 3, kv_heads=2, head_dim=32)
    knobs = space(shape, probe_device("cpu", {}), None)
    able = {
        knob.name: [value.name for value in knob.values if value.unavailable is None and not value.compiles]
        for knob in knobs
    }
    found = []
    for knob in knobs:
        caches = [cache for cache in knob.when.get("cache", ("dynamic",)) if cache in able["cache"]]
        names = able[knob.name] if knob.name != "dtype" else []
        found += [{"cache": cache, knob.name: name} for cache in caches[:1] for name in names]
    return found


@pytest.mark.parametrize("settings", here(), ids=lambda own: "+".join(own.values()))
def test_every_value_that_can_run_here_generates(
    llama: PreTrainedModel, make_plan: MakePlan, settings: dict[str, str]
) -> None:
    planned = load_plan(make_plan({"one": settings}), model=llama)
    output = planned.generate(IDS, max_new_tokens=4, eos_token_id=None)
    if settings["cache"].startswith(("quanto", "hqq", "fp8")):
        assert output.shape == (2, 16)
    else:
        assert torch.equal(output, llama.generate(IDS, max_new_tokens=4, eos_token_id=None, do_sample=False))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_winner_compiles_once_for_a_shorter_prompt(
    llama: PreTrainedModel, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if probe_device("cpu", {}).facts["compile"] is not None:
        pytest.skip("no compiler")
    planned = load_plan(make_plan({"one": {"cache": "static", "compile": "default"}}), model=llama)
    expected = llama.generate(IDS, max_new_tokens=4, eos_token_id=None, do_sample=False)
    assert torch.equal(planned.generate(IDS, max_new_tokens=4, eos_token_id=None), expected)
    graphs = compiled_graphs()
    assert graphs > 0
    planned.generate(IDS[:, :6], max_new_tokens=4)
    assert compiled_graphs() == graphs
    leftovers.forget_compiled(llama)
    leftovers.forget_length(llama)


# Memory -------------------------------------------------------------------------------------------


def test_too_little_memory_takes_the_best_that_fits(
    llama: PreTrainedModel, spy: Spy, monkeypatch: pytest.MonkeyPatch, make_plan: MakePlan
) -> None:
    planned = load_plan(make_plan(), model=llama)
    own = min(headroom._own_bytes(), GIB)
    free(monkeypatch, needed_bytes(PEAKS["dynamic"]) - own + 2**26)
    with pytest.warns(FallbackWarning, match="^too little memory is free for static; dynamic is used$"):
        planned.generate(IDS, 2)
    assert spy.caches == ["DynamicCache"]


def test_what_the_loaded_model_holds_counts_as_free(monkeypatch: pytest.MonkeyPatch, make_plan: MakePlan) -> None:
    plan = make_plan()
    free(monkeypatch, 2 * GIB)
    monkeypatch.setattr(headroom, "_own_bytes", lambda: GIB // 2)
    assert headroom.host_bytes(plan) == 2 * GIB + GIB // 2
    # Beyond what the measured process held, it is something else that is in memory here.
    monkeypatch.setattr(headroom, "_own_bytes", lambda: 50 * GIB)
    assert headroom.host_bytes(plan) == 2 * GIB + GIB
    assert headroom.host_bytes(make_plan({"unknown": {}})) is None


def test_without_a_device_of_its_own_there_is_no_device_memory(llama: PreTrainedModel) -> None:
    assert headroom.device_bytes(llama) is None


# After an error -----------------------------------------------------------------------------------


def test_out_of_memory_falls_back_to_who_needs_less(llama: PreTrainedModel, spy: Spy, make_plan: MakePlan) -> None:
    candidates = {**CANDIDATES, "dynamic": {"grad_mode": "inference_mode"}}
    planned = load_plan(make_plan(candidates, peaks={**PEAKS, "dynamic": PEAKS["static"]}), model=llama)
    spy.fails = lambda cache, attention: full() if cache == "StaticCache" else None
    with pytest.warns(FallbackWarning) as told:
        output = planned.generate(IDS, 3)
    assert [str(one.message) for one in told] == ["static failed: the host ran out of memory; going on with eager"]
    assert told[0].filename == __file__
    assert spy.attention == ["eager"]
    assert output.shape == (2, 15)


@pytest.mark.uses("paged")
def test_it_does_so_of_a_device_in_generate_batch_which_tells_by_text(
    llama: PreTrainedModel, make_plan: MakePlan
) -> None:
    def fail(*arguments: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    planned = load_plan(make_plan({"paged": {"cache": "paged"}, "dynamic": {}}), model=llama)
    hook = llama.register_forward_pre_hook(fail)
    try:
        with pytest.warns(FallbackWarning, match="^paged failed: the device ran out of memory; going on with dynamic$"):
            assert planned.generate(IDS, 3).shape == (2, 15)
    finally:
        hook.remove()


def test_each_fallback_is_told_and_the_last_error_is_the_callers(
    llama: PreTrainedModel, spy: Spy, make_plan: MakePlan
) -> None:
    planned = load_plan(make_plan(), model=llama)
    spy.fails = lambda cache, attention: full()
    with pytest.warns(FallbackWarning) as told, pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        planned.generate(IDS, 3)
    assert [str(one.message).rpartition(" ")[2] for one in told] == ["dynamic", "eager"]
    assert llama.config._attn_implementation == "sdpa"


def test_a_rule_for_the_error_names_who_is_next(llama: PreTrainedModel, spy: Spy, make_plan: MakePlan) -> None:
    rule = {"when": {"error_kind": "oom_host"}, "use": "eager", "because": "of a test"}
    planned = load_plan(make_plan(rules=(Rule.model_validate(rule),)), model=llama)
    spy.fails = lambda cache, attention: full() if cache == "StaticCache" else None
    with pytest.warns(FallbackWarning, match="going on with eager"):
        planned.generate(IDS, 3)


def test_a_kernel_that_cannot_serve_the_call_is_replaced(llama: PreTrainedModel, spy: Spy, make_plan: MakePlan) -> None:
    planned = load_plan(make_plan({"math": {"attention": "sdpa_math"}, "eager": CANDIDATES["eager"]}), model=llama)
    error = RuntimeError("No available kernel. Aborting execution.")
    spy.fails = lambda cache, attention: error if attention == "sdpa" else None
    with pytest.warns(FallbackWarning, match="math failed: the forced attention kernel"):
        planned.generate(IDS, 3)


def test_other_errors_are_the_callers_at_once(llama: PreTrainedModel, spy: Spy, make_plan: MakePlan) -> None:
    planned = load_plan(make_plan(), model=llama)
    spy.fails = lambda cache, attention: RuntimeError("a defect")
    with pytest.raises(RuntimeError, match=r"^a defect$"):
        planned.generate(IDS, 3)


def test_with_a_streamer_nothing_is_tried_again(llama: PreTrainedModel, spy: Spy, make_plan: MakePlan) -> None:
    class Streamer:
        def put(self, tokens: torch.Tensor) -> None: ...

        def end(self) -> None: ...

    planned = load_plan(make_plan(), model=llama)
    spy.fails = lambda cache, attention: full()
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        planned.generate(IDS[:1], 3, streamer=Streamer())


@pytest.mark.uses("paged")
def test_a_paged_winner_leaves_a_streamer_to_the_next_candidate(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    class Streamer:
        heard = 0

        def put(self, tokens: torch.Tensor) -> None:
            self.heard += 1

        def end(self) -> None: ...

    streamer = Streamer()
    planned = load_plan(make_plan({"paged": {"cache": "paged"}, **CANDIDATES}), model=llama)
    with pytest.warns(FallbackWarning, match="^paged failed: generate_batch takes no streamer; going on with static$"):
        planned.generate(IDS[:1], 3, streamer=streamer, eos_token_id=None)
    assert streamer.heard == 1 + 3
    planned.generate(IDS[:1], 3, streamer=None)


@pytest.mark.uses("paged")
@pytest.mark.parametrize(
    ("habit", "reason"),
    [
        ({"num_beams": 2}, "generate_batch has no beams, and num_beams is 2"),
        ({"repetition_penalty": 1.5}, "generate_batch has no RepetitionPenaltyLogitsProcessor"),
        ({"min_new_tokens": 3}, "generate_batch has no MinNewTokensLengthLogitsProcessor"),
        ({"max_time": 60.0}, "generate_batch does not stop by max_time"),
    ],
    ids=str,
)
def test_what_generate_batch_would_leave_out_is_left_to_the_next_candidate(
    llama: PreTrainedModel, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, habit: dict[str, Any], reason: str
) -> None:
    own = llama.generation_config.to_dict()
    monkeypatch.setattr(llama, "generation_config", GenerationConfig(**{**own, **habit}))
    expected = llama.generate(IDS, max_new_tokens=5)
    plan = make_plan({"paged": {"cache": "paged"}, "dynamic": {}})
    with patch_generate(llama, plan), pytest.warns(FallbackWarning, match=f"^paged failed: {reason}"):
        assert torch.equal(llama.generate(IDS, max_new_tokens=5), expected)


@pytest.mark.uses("paged")
def test_so_is_what_it_would_not_hand_back(
    llama: PreTrainedModel, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.generation_config, "return_dict_in_generate", True)
    plan = make_plan({"paged": {"cache": "paged"}, "dynamic": {}})
    with pytest.warns(FallbackWarning, match="^paged failed: generate_batch hands back tokens alone"):
        assert isinstance(cache_of(load_plan(plan, model=llama).generate(IDS, 2)), DynamicCache)


def test_beams_are_left_to_a_cache_that_can_be_reordered(
    llama: PreTrainedModel, spy: Spy, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "reorder_cache" in vars(QuantizedLayer):  # as Transformers 5.17 is
        monkeypatch.delattr(QuantizedLayer, "reorder_cache")
    planned = load_plan(make_plan({"quantised": {"cache": "quanto_int4"}, "dynamic": {}}), model=llama)
    planned.generate(IDS, 2)
    with pytest.warns(FallbackWarning, match="^quantised failed: this version of transformers cannot reorder a quant"):
        planned.generate(IDS, 2, num_beams=2)
    assert spy.caches == ["QuantizedCache", "DynamicCache"]


def test_what_a_failed_call_held_is_free_before_the_next_one(
    llama: PreTrainedModel, spy: Spy, make_plan: MakePlan
) -> None:
    import weakref

    held: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def fails(cache: str, attention: str) -> BaseException | None:
        alive.extend(reference() is not None for reference in held)
        if cache != "StaticCache":
            return None
        # As a frame of a failed forward pass would hold it.
        ballast = torch.empty(8)
        held.append(weakref.ref(ballast))
        try:
            raise full()
        except RuntimeError as error:
            return error

    spy.fails = fails
    planned = load_plan(make_plan(), model=llama)
    with pytest.warns(FallbackWarning):
        planned.generate(IDS, 2)
    assert held
    assert not any(alive)


# Loading ------------------------------------------------------------------------------------------


def test_a_plan_file_loads_its_model_as_it_was_measured(tmp_path: Path, make_plan: MakePlan) -> None:
    path, before = tmp_path / "best_plan.json", torch.get_num_threads()
    path.write_text(make_plan({"eager": {"attention": "eager", "dtype": "bfloat16"}}).model_dump_json())
    planned = load_plan(path)
    assert isinstance(planned, PlannedModel)
    assert (planned.model.dtype, planned.model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert planned.generate(IDS, 3).shape == (2, 15)
    assert torch.get_num_threads() == before


def test_a_local_model_is_named_by_the_caller(tiny_directory: Path, make_plan: MakePlan) -> None:
    plan = make_plan({"half": {"dtype": "bfloat16"}})
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"id": "./tiny", "dimensions": None})})
    with pytest.raises(UsageError, match=r"keeps the last part only; say where it is with model=PATH"):
        load_plan(plan)
    assert load_plan(plan, model=tiny_directory).model.config.vocab_size == 64
    random = plan.model.model_copy(update={"id": "random:./tiny", "weights": "random"})
    assert load_plan(plan.model_copy(update={"model": random}), model=tiny_directory).model.config.vocab_size == 64


@pytest.mark.parametrize("model", [42, torch.nn.Linear(1, 1)])
def test_what_is_no_model_is_refused(model: Any, make_plan: MakePlan) -> None:
    with pytest.raises(UsageError, match="is no Transformers model and no path"):
        load_plan(make_plan(), model=model)


def test_blocks_may_end_in_any_order(llama: PreTrainedModel, spy: Spy, make_plan: MakePlan) -> None:
    first, second = (patch_generate(llama, make_plan({"one": {"cache": cache}})) for cache in ("static", "dynamic"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    llama.generate(IDS, max_new_tokens=3)
    second.__exit__(None, None, None)
    assert spy.caches == ["DynamicCache"]
    assert not [name for name in vars(llama) if name == "generate" or name.startswith("_kvat")]


@pytest.mark.uses("paged")
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"return_dict_in_generate": True}, {"max_time": 100.0}])
def test_what_no_candidate_can_serve_passes_unchanged(
    llama: PreTrainedModel, make_plan: MakePlan, options: dict[str, Any]
) -> None:
    plan = make_plan({"pages": {"cache": "paged"}})
    expected = llama.generate(IDS, max_new_tokens=4, **options)
    with (
        patch_generate(llama, plan),
        pytest.warns(PlanWarning, match="no candidate can serve the call: generate_batch"),
    ):
        found = llama.generate(IDS, max_new_tokens=4, **options)
    tokens = (getattr(one, "sequences", one) for one in (found, expected))
    assert torch.equal(*tokens)


def test_a_plan_for_another_dtype_says_so_in_one_line(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    plan = make_plan({"half": {"dtype": "bfloat16"}})
    with pytest.raises(
        NothingFeasible, match=r"half cannot run here: dtype=bfloat16 \(the model is loaded in float32\); nor"
    ):
        load_plan(plan, model=llama)


def test_arguments_that_make_no_sense_are_refused_in_a_line(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    with pytest.raises(UsageError, match="a NoneType is no plan and no path of one"):
        load_plan(None, model=llama)  # type: ignore[arg-type]
    with (
        pytest.raises(UsageError, match="a str is no model that is loaded; load it, or use load_plan"),
        patch_generate("./tiny", make_plan()),  # type: ignore[arg-type]
    ):
        pass
    with pytest.raises(UsageError, match="requests is -1; give a number from 1 on"):
        load_plan(make_plan(), model=llama, requests=-1)
    with pytest.raises(UsageError, match="requests is '5'; give a number from 1 on"):
        load_plan(make_plan(), model=llama, requests="5")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="prompt_tokens is -4; give a number from 1 on"):
        load_plan(make_plan(), model=llama).choose(prompt_tokens=-4)


def test_a_plan_of_another_engine_or_version_is_refused(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    with pytest.raises(UsageError, match="the plan is for the engine fake"):
        load_plan(make_plan(engine=PlanEngine(name="fake", versions={})), model=llama)
    with pytest.raises(UsageError, match="does not know cache=cloud"):
        load_plan(make_plan({"cloud": {"cache": "cloud"}}), model=llama)


def test_rows_are_needed(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    with pytest.raises(UsageError, match="input_ids have 1 dimensions; give one row per prompt"):
        load_plan(make_plan(), model=llama).generate(IDS[0], 3)


@pytest.mark.parametrize("given", [BatchEncoding({"input_ids": IDS}), IDS.tolist()], ids=["encoding", "list"])
def test_of_what_a_tokenizer_returns_only_the_tensor_will_do(
    llama: PreTrainedModel, make_plan: MakePlan, given: Any
) -> None:
    with pytest.raises(UsageError, match="is no tensor; of what a tokenizer returns pass its input_ids"):
        load_plan(make_plan(), model=llama).generate(given, 3)


@pytest.mark.parametrize("shape", [(1, 0), (0, 5)])
def test_so_are_tokens(llama: PreTrainedModel, make_plan: MakePlan, shape: tuple[int, int]) -> None:
    empty = torch.empty(shape, dtype=torch.long)
    with pytest.raises(UsageError, match=r"input_ids of shape \(\d, \d\) hold no token; give at least one per prompt"):
        load_plan(make_plan(), model=llama).generate(empty, 3)
    with patch_generate(llama, make_plan()), pytest.raises(UsageError, match="hold no token"):
        llama.generate(empty, max_new_tokens=3)


def test_the_one_device_of_metal_has_no_number(
    llama: PreTrainedModel, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = []

    def probe(device: str, options: Mapping[str, str]) -> Any:
        probed.append(device)
        return probe_device("cpu", options)

    monkeypatch.setattr(type(llama), "device", torch.device("mps", 0))
    monkeypatch.setattr(runtime, "probe_device", probe)
    assert load_plan(make_plan(), model=llama)._target.device == "mps"
    assert probed == ["mps"]


# What differs -------------------------------------------------------------------------------------


def test_a_plan_that_was_made_here_is_told_nothing_of(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_plan(make_plan(), model=llama).generate(IDS, 2)
    assert [str(one.message) for one in told if issubclass(one.category, PlanWarning)] == []


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("machine", {"device": "cuda:0", "fingerprint": "0"}, "device cpu instead of cuda:0"),
        ("machine", {"cpu": "Abacus", "fingerprint": "0"}, "instead of Abacus"),
        ("machine", {"fingerprint": "0"}, "fingerprint [0-9a-f]+ instead of 0"),
        ("engine", {"versions": {"torch": "1.0"}}, r"torch 2\.\S+ instead of 1\.0"),
        ("model", {"quantization": "gptq 4 bits"}, "quantisation none instead of gptq 4 bits"),
    ],
)
def test_what_differs_from_the_plan_is_named(
    llama: PreTrainedModel, part: str, changes: dict[str, Any], named: str, make_plan: MakePlan
) -> None:
    plan = make_plan()
    changed = plan.model_copy(update={part: getattr(plan, part).model_copy(update=changes)})
    with pytest.warns(PlanWarning, match=named) as told:
        load_plan(changed, model=llama)
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert told[0].filename == __file__


@pytest.mark.parametrize("name", ModelDimensions.model_fields)
def test_a_model_of_another_shape_is_noticed(llama: PreTrainedModel, make_plan: MakePlan, name: str) -> None:
    plan = make_plan()
    other = plan.model.dimensions.model_copy(update={name: "gpt2" if name == "architecture" else 4097})
    changed = plan.model_copy(update={"model": plan.model.model_copy(update={"dimensions": other})})
    with pytest.warns(PlanWarning, match=rf"for: {name} \w+ instead of (gpt2|4097);"):
        load_plan(changed, model=llama)


def test_other_weights_are_noticed(tiny_directory: Path, make_plan: MakePlan) -> None:
    plan = make_plan({"half": {"dtype": "bfloat16"}})
    other = plan.model.model_copy(update={"id": "./tiny", "sha256": "0"})
    with pytest.warns(PlanWarning, match="weights with another digest"):
        load_plan(plan.model_copy(update={"model": other}), model=tiny_directory)


# In place of generate -----------------------------------------------------------------------------


def test_inside_the_block_generate_follows_the_plan(
    llama: PreTrainedModel, spy: Spy, tmp_path: Path, make_plan: MakePlan
) -> None:
    path = tmp_path / "best_plan.json"
    path.write_text(make_plan().model_dump_json())
    with patch_generate(llama, path):
        llama.generate(IDS, max_new_tokens=3)
        llama.generate(inputs=IDS, max_new_tokens=3)
        llama.generate(input_ids=IDS, generation_config=GenerationConfig(max_new_tokens=4))
        llama.generate(IDS, None, max_length=20)
    llama.generate(IDS, max_new_tokens=3)
    assert spy.caches == ["StaticCache"] * 4 + ["DynamicCache"]
    assert spy.slots[:4] == [15, 15, 16, 20]


def test_what_is_generated_stays_the_callers_business(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    habits, llama.generation_config = llama.generation_config, GenerationConfig(do_sample=True, top_k=50)
    try:
        torch.manual_seed(0)
        expected = llama.generate(IDS, max_new_tokens=8)
        with patch_generate(llama, make_plan()):
            torch.manual_seed(0)
            assert torch.equal(llama.generate(IDS, max_new_tokens=8), expected)
            two_beams = GenerationConfig(num_beams=2, do_sample=False, max_new_tokens=3, num_return_sequences=2)
            assert llama.generate(IDS, generation_config=two_beams).shape[0] == 4
    finally:
        llama.generation_config = habits


def test_calls_that_no_plan_can_serve_pass_unchanged(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    cache = DynamicCache()
    embeddings = llama.get_input_embeddings()(IDS)
    with patch_generate(llama, make_plan()):
        with pytest.warns(PlanWarning, match="brings a cache of its own"):
            llama.generate(IDS, past_key_values=cache, max_new_tokens=2)
        with pytest.warns(PlanWarning, match="has no tensor of input_ids"):
            assert llama.generate(inputs_embeds=embeddings, max_new_tokens=2).shape == (2, 2)
    assert cache.get_seq_length() == 13


def test_what_passes_a_plan_over_is_greedy_unless_the_caller_says_otherwise(
    llama: PreTrainedModel, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llama.generate(IDS, max_new_tokens=8, do_sample=False)
    own = {**llama.generation_config.to_dict(), "do_sample": True, "temperature": 100.0}
    monkeypatch.setattr(llama, "generation_config", GenerationConfig(**own))
    planned = load_plan(make_plan(), model=llama)
    for options in ({}, {"generation_config": GenerationConfig()}):
        with pytest.warns(PlanWarning, match="brings a cache of its own"):
            assert torch.equal(planned.generate(IDS, 8, past_key_values=DynamicCache(), **options), expected)
    with pytest.warns(PlanWarning, match="brings a cache of its own"):
        sampled = planned.generate(
            IDS, 8, past_key_values=DynamicCache(), generation_config=GenerationConfig(do_sample=True)
        )
    assert not torch.equal(sampled, expected)


@pytest.mark.parametrize(
    "how",
    [
        {"prompt_lookup_num_tokens": 3},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=4)},
        {"assistant_model": None},
        {"custom_generate": lambda model, input_ids, **options: input_ids},
    ],
    ids=["lookup", "config", "assistant", "custom"],
)
def test_assisted_and_custom_decoding_pass_unchanged(
    llama: PreTrainedModel, spy: Spy, make_plan: MakePlan, how: dict[str, Any]
) -> None:
    if "assistant_model" in how:
        how = {"assistant_model": AutoModelForCausalLM.from_pretrained(builtin_path("llama"), dtype=torch.float32)}
    given = {"max_new_tokens": 4, "attention_mask": torch.ones_like(IDS[:1]), **how}
    expected = llama.generate(IDS[:1], **given)
    with (
        patch_generate(llama, make_plan()),
        pytest.warns(PlanWarning, match="^the call asks for assisted or custom decoding; the plan is not used for it$"),
    ):
        assert torch.equal(llama.generate(IDS[:1], **given), expected)
    assert "StaticCache" not in spy.caches


@pytest.mark.uses("paged")
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
def test_a_paged_plan_generates_as_much_as_a_call_means(
    llama: PreTrainedModel, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan({"paged": {"cache": "paged"}})
    expected = llama.generate(IDS, eos_token_id=None)
    with patch_generate(llama, plan):
        assert torch.equal(llama.generate(IDS, eos_token_id=None), expected)
        monkeypatch.setattr(llama.generation_config, "max_length", 15)
        assert llama.generate(IDS, eos_token_id=None).shape == (2, 15)
        monkeypatch.setattr(llama.generation_config, "max_length", 9)
        with (
            pytest.warns(PlanWarning, match="generate_batch cannot generate -3 tokens"),
            pytest.raises(ValueError, match="max_length"),
        ):
            llama.generate(IDS)


def test_afterwards_generate_is_what_it_was_even_after_an_error(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    before = llama.generate
    with patch_generate(llama, make_plan()):
        assert llama.generate != before
    with pytest.raises(ZeroDivisionError), patch_generate(llama, make_plan()):
        raise ZeroDivisionError
    assert llama.generate == before
    assert "generate" not in vars(llama)


def test_blocks_nest_and_the_innermost_counts(llama: PreTrainedModel, spy: Spy, make_plan: MakePlan) -> None:
    eager = make_plan({"eager": CANDIDATES["eager"]})
    with patch_generate(llama, make_plan()):
        with patch_generate(llama, eager):
            llama.generate(IDS, max_new_tokens=2)
        llama.generate(IDS, max_new_tokens=2)
    llama.generate(IDS, max_new_tokens=2)
    assert list(zip(spy.caches, spy.attention, strict=True)) == [
        ("DynamicCache", "eager"),
        ("StaticCache", "sdpa"),
        ("DynamicCache", "sdpa"),
    ]


def test_somebody_elses_patch_is_kept(llama: PreTrainedModel, make_plan: MakePlan) -> None:
    calls = []
    own = type(llama).generate

    def theirs(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return own(llama, *arguments, **options)

    llama.generate = theirs
    try:
        with patch_generate(llama, make_plan()):
            llama.generate(input_ids=IDS, max_new_tokens=2)
        assert llama.generate is theirs
        assert calls[0]["cache_implementation"] == "static"
    finally:
        del llama.generate


# On a card ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card of torch.cuda")
def test_on_a_card_memory_that_ran_out_is_there_for_the_next_candidate(make_plan: MakePlan) -> None:
    model = AutoModelForCausalLM.from_pretrained(builtin_path("llama"), dtype=torch.float32).to("cuda:0").eval()
    total = torch.cuda.get_device_properties(0).total_memory
    own = headroom.device_bytes(model)
    assert own is not None
    assert torch.cuda.mem_get_info(0)[0] < own <= total
    plan = make_plan({"static": {"cache": "static"}, "dynamic": {}}, peaks={})
    ids, seen = IDS.to("cuda:0"), []

    def greedy(module: Any, arguments: Any, options: Mapping[str, Any]) -> None:
        if isinstance(given_cache(options), StaticCache):
            ballast = torch.empty(torch.cuda.mem_get_info(0)[0] // 2, dtype=torch.uint8, device="cuda:0")
            torch.empty(2 * total, dtype=torch.uint8, device="cuda:0")
            ballast.zero_()
        seen.append(headroom.device_bytes(model))

    model.register_forward_pre_hook(greedy, with_kwargs=True)
    with pytest.warns(PlanWarning):
        planned = load_plan(plan, model=model)
    with pytest.warns(FallbackWarning, match="static failed: the device ran out of memory; going on with dynamic"):
        assert planned.generate(ids, 2).shape == (2, 14)
    assert seen[0] > own * 0.9


# As printed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1])
def test_the_code_in_the_readme_runs(make_plan: MakePlan, tmp_path: Path, place: int) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "best_plan.json").write_text(make_plan().model_dump_json())
    command = [sys.executable, "-W", "error::UserWarning", "-c", blocks[place]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
