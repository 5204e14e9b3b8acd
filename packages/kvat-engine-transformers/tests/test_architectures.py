"""The matrix of architectures: each ends in a plan or in a reason of one line, and each value does what it says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest
import torch
from pydantic import JsonValue
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from typing_extensions import Self

from kvat_core import Plan, Profile, TuneRequest, tune
from kvat_core.engine import EngineError, Probe, SpaceRequest
from kvat_core.errors import UsageError
from kvat_core.journal import read_journal
from kvat_core.measure.deadlines import Limits
from kvat_core.measure.messages import Operation, Request
from kvat_core.measure.supervisor import value_or_raise
from kvat_core.measure.worker import Worker
from kvat_core.schema import (
    Candidate,
    CandidateEntry,
    Failed,
    Knob,
    ModelRef,
    Objective,
    PromptSource,
    Recipe,
    Scenario,
)
from kvat_core.space import enumerate_candidates
from kvat_engine_transformers import TransformersAdapter, TransformersEngine

Prepared = Callable[..., tuple[TransformersAdapter, Recipe]]

WINDOW = 32
SCENARIO = Scenario(prompt_tokens=160, output_tokens=8)  # longer than the window, and than the smallest chunk
TEXT = PromptSource(kind="text", value="unused, there is no tokenizer")

HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
BODY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}
GPT: dict[str, Any] = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
LATENT: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MAMBA: dict[str, Any] = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
NEO: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": WINDOW,
    "max_position_embeddings": 512,
}
HYBRID_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


class Expected(NamedTuple):
    """A model that is tuned: its config, and each value of a knob that Transformers has not for it."""

    config: Mapping[str, Any]
    excluded: Mapping[str, str] = {}
    """Knob=value → a part of its reason. What the machine excludes for any model is not told here."""
    fails: Mapping[str, str] = {}
    """Label → kind and reason, where only a trial tells."""


QUANTISED = tuple(f"cache={kind}" for kind in ("quanto_int4", "quanto_int2", "hqq_int8", "hqq_int4", "hqq_int2", "fp8"))
SDPA = tuple(f"attention={kernel}" for kernel in ("sdpa", "sdpa_math", "sdpa_flash"))
SHARING = "block_sharing=on"
PAGED = ("cache=paged", SHARING)


NO_FLASH = "unsupported: the forced attention kernel cannot serve this model or mask on this device"
OTHER_HEADS = "unsupported: Transformers made the cache for other heads than this model has"


def without(values: tuple[str, ...], reason: str) -> dict[str, str]:
    return dict.fromkeys(values, reason)


TUNED = {
    "llama": Expected(BODY | HEADS),
    "mistral": Expected(
        BODY | HEADS | {"sliding_window": WINDOW},
        without((*QUANTISED, SHARING), "mistral has sliding attention layers"),
    ),
    "qwen3": Expected(BODY | HEADS),
    "gemma3_text": Expected(
        BODY | HEADS | HYBRID_WINDOWS, without((*QUANTISED, SHARING), "gemma3_text has sliding attention layers")
    ),
    "gpt2": Expected(GPT, {"attention=flex_attention": "no flex attention for the architecture gpt2"}),
    "phi3": Expected(BODY | HEADS | {"pad_token_id": 0}),
    "mixtral": Expected(BODY | HEADS | EXPERTS),
    "deepseek_v3": Expected(
        BODY | LATENT,
        {
            "cache=paged": "deepseek_v3 has a projection common to them",
            "attention=sdpa_flash": "deepseek_v3 has 80 and 16",
        },
    ),
    "falcon": Expected(
        {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True},
        {
            "cache=paged": "Transformers does not allow for falcon",
            "attention=flex_attention": "no flex attention for the architecture falcon",
        },
        {
            "attention=sdpa_flash": NO_FLASH,
            "attention=sdpa_flash cache=static": NO_FLASH,
            "cache=static prefill_chunk=128": OTHER_HEADS,
        },
    ),
    "gpt_oss": Expected(
        BODY | HEADS | EXPERTS | HYBRID_WINDOWS,
        {
            **without(SDPA, "Transformers has no SDPA for the architecture gpt_oss"),
            **without((*QUANTISED, SHARING), "gpt_oss has sliding attention layers"),
            "attention=flex_attention": "no flex attention on the CPU for the attention sinks",
        },
    ),
    "gpt_neo": Expected(
        NEO,
        {
            **without(SDPA, "Transformers has no SDPA for the architecture gpt_neo"),
            "cache=static": "a static one gives other tokens",
            "cache=paged": "Transformers does not allow for gpt_neo",
            "attention=flex_attention": "no flex attention for the architecture gpt_neo",
        },
    ),
    "qwen3_next": Expected(
        BODY | HEADS | LINEAR,
        {
            **without((*QUANTISED, *PAGED), "qwen3_next has linear attention layers"),
            "attention=flex_attention": "no flex attention for the architecture qwen3_next",
        },
    ),
    "falcon_h1": Expected(
        BODY | HEADS | MAMBA,
        {
            **without((*QUANTISED, *PAGED), "falcon_h1 has hybrid layers"),
            "attention=flex_attention": "no flex attention for the architecture falcon_h1",
        },
    ),
    "recurrent_gemma": Expected(
        BODY | HEADS | {"block_types": ["recurrent", "attention"], "attention_window_size": WINDOW, "lru_width": 64},
        {
            **without((*QUANTISED, *PAGED), "recurrent_gemma has "),
            **without(
                tuple(f"prefill_chunk={tokens}" for tokens in (128, 512, 2048)),
                "hands back no cache that a second chunk could go on with",
            ),
        },
    ),
}

REFUSED = {
    "minimax": (BODY | HEADS | EXPERTS | {"block_size": 16}, "keeps a cache of its own kind"),
    "mamba": ({"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2}, "has no attention"),
    "openai-gpt": (GPT, "keeps no keys and values"),
    "bert": (BODY | {"num_attention_heads": 4, "architectures": ["BertLMHeadModel"]}, "is an encoder"),
}


@cache
def saved(folder: Path, model_type: str) -> str:
    """A checkpoint whose next token depends on all those before."""
    torch.manual_seed(0)
    path = folder / model_type
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **TUNED[model_type].config), dtype=torch.float32
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.25)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Directory of a model by its type; made once."""
    folder = tmp_path_factory.mktemp("zoo")

    def directory(model_type: str) -> str:
        if model_type not in CONFIG_MAPPING:
            pytest.skip(f"this version of transformers has no {model_type}")
        return saved(folder, model_type)

    return directory


@cache
def probe() -> Probe:
    return TransformersEngine().probe("cpu", {})


@cache
def offered(model_id: str) -> tuple[tuple[Knob, ...], list[CandidateEntry]]:
    """Everything that there is for a model on the CPU, with what is excluded of it."""
    engine = TransformersEngine()
    shape = engine.describe(ModelRef(id=model_id), "cpu", {})
    knobs = tuple(engine.space(shape, probe(), SpaceRequest(space="full", threads=1)))

    def check(settings: Mapping[str, str]) -> str | None:
        return engine.check(settings, shape, probe())

    pinned = {"dtype": "float32"}
    entries = enumerate_candidates(knobs, "full", pinned=pinned, excluded=(), incumbent={}, check=check)
    return knobs, entries


def unavailable(knobs: tuple[Knob, ...]) -> dict[str, str]:
    """Reasons by knob=value."""
    return {
        f"{knob.name}={value.name}": value.unavailable for knob in knobs for value in knob.values if value.unavailable
    }


def covering(knobs: tuple[Knob, ...], entries: list[CandidateEntry]) -> list[Candidate]:
    """Each value once, in its simplest candidate, and each attention and chunk with a static cache as well."""
    default = {knob.name: knob.default for knob in knobs}

    def changed(candidate: Candidate) -> dict[str, str]:
        return {name: value for name, value in candidate.settings.items() if value != default[name]}

    can_run = [entry.candidate for entry in entries if entry.exclusion is None and not entry.candidate.compiles]
    chosen: list[Candidate] = []
    seen: set[tuple[str, str]] = set()
    for candidate in sorted(can_run, key=lambda one: len(changed(one))):
        pairs = set(changed(candidate).items())
        beside_static = {name for name, _ in pairs - {("cache", "static")}}
        in_pairs = ("cache", "static") in pairs and len(pairs) == 2 and beside_static <= {"attention", "prefill_chunk"}
        if not chosen or pairs - seen or in_pairs:
            chosen.append(candidate)
            seen |= pairs
    return chosen


@pytest.mark.parametrize("model_type", TUNED)
def test_what_transformers_has_not_for_an_architecture_is_excluded_before_anything_is_tried(
    zoo: Callable[[str], str], model_type: str
) -> None:
    knobs, _ = offered(zoo(model_type))
    of_any_model = unavailable(offered(zoo("llama"))[0])
    reasons = {name: reason for name, reason in unavailable(knobs).items() if name not in of_any_model}
    expected = {name: part for name, part in TUNED[model_type].excluded.items() if name not in of_any_model}
    assert reasons.keys() == expected.keys()
    assert [name for name, reason in reasons.items() if expected[name] not in reason] == []


@pytest.mark.parametrize("model_type", TUNED)
def test_each_value_that_is_offered_runs_as_it_says_and_gives_the_same_tokens(
    zoo: Callable[[str], str], prepared: Prepared, model_type: str
) -> None:
    model_id = zoo(model_type)
    knobs, entries = offered(model_id)
    failed: dict[str, str] = {}
    reference: torch.Tensor | None = None
    done: list[Recipe] = []
    for candidate in covering(knobs, entries):
        adapter, recipe = prepared(model_id, SCENARIO, **candidate.settings)
        if recipe in done:
            continue
        done.append(recipe)
        prompt = adapter.make_prompt(TEXT, [SCENARIO.prompt_tokens], 1)
        try:
            applied, tokens = adapter.applied(prompt), adapter.generate(prompt, 8).tokens
        except EngineError as error:
            failed[candidate.label] = f"{error.kind}: {error.reason}"
            continue
        assert applied.mismatches == (), candidate.label
        reference = tokens if reference is None else reference
        assert tokens.shape == reference.shape
        assert candidate.lossy or torch.equal(tokens, reference), candidate.label
    assert failed == dict(TUNED[model_type].fails)


class Here:
    """A worker in this process, to spare each tune the imports of its children."""

    pid = None

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._worker = Worker()

    def call(self, operation: Operation, arguments: dict[str, JsonValue], phase: str, limits: Limits) -> JsonValue:
        return value_or_raise(self._worker.handle(Request(operation=operation, arguments=arguments)), phase)

    def __enter__(self) -> Self:
        self._before = dict(os.environ)
        os.environ.update(self._environment)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.environ.clear()
        os.environ.update(self._before)


UNTRIED = (
    ("compile", "default"),
    ("grad_mode", "inference_mode"),
    ("attention", "sdpa_math"),
    ("attention", "sdpa_flash"),
)
"""Left out of the tunes, for the time that they would take."""


def tuned(model_id: str, out: Path) -> Plan:
    profile = Profile(
        name="quick",
        scenarios=(SCENARIO,),
        objective=Objective(ttft=1, decode=1),
        launches=1,
        samples=1,
        warmup=1,
    )
    request = TuneRequest(
        model=model_id,
        out=out,
        device="cpu",
        threads=1,
        profile=profile,
        space="default",
        excluded=UNTRIED,
    )
    return tune(request, open_worker=Here).plan


@pytest.mark.parametrize("model_type", [one for one in TUNED if one != "gpt_neo"])
def test_an_architecture_ends_in_a_plan(zoo: Callable[[str], str], tmp_path: Path, model_type: str) -> None:
    plan = tuned(zoo(model_type), tmp_path / "out")
    assert plan.require_winner()
    reasons = [one.reason for one in plan.candidates if one.state == "excluded"]
    assert all(reason and "\n" not in reason for reason in reasons)
    failures = [event for event in read_journal(tmp_path / "out" / "journal.jsonl") if isinstance(event, Failed)]
    assert failures == []
    assert {one.state for one in plan.candidates} <= {"ok", "pruned", "excluded"}


def test_an_architecture_of_which_nothing_is_left_to_compare_says_so(zoo: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no candidate is left beside what runs today: --exclude") as caught:
        tuned(zoo("gpt_neo"), tmp_path / "out")
    assert "\n" not in str(caught.value)


def refused(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        tuned(str(folder), folder / "out")
    assert not (folder / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_without_a_cache_to_tune_is_refused(tmp_path: Path, model_type: str) -> None:
    settings, reason = REFUSED[model_type]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).save_pretrained(tmp_path)
    assert reason in refused(tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("t5", vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    assert "is an encoder-decoder" in refused(tmp_path)


@pytest.mark.parametrize("quantised", [{"quant_method": "gptq"}, {"quant_method": "unheard-of"}])
def test_a_checkpoint_whose_quantisation_transformers_cannot_read_is_refused(
    tmp_path: Path, quantised: dict[str, str]
) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **BODY, **HEADS)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantised}))
    assert f"is quantised ({quantised['quant_method']}) and cannot be loaded" in refused(tmp_path)


def test_an_encoder_with_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **BODY, num_attention_heads=4)).save_pretrained(
        tmp_path
    )
    assert "BertForMaskedLM, which does not generate text" in refused(tmp_path)
