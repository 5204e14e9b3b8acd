"""The heavy half: one loaded model in one worker process."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from kvat_core.engine import EngineAdapter, EngineError
from kvat_core.schema import Applied, PromptSource, Recipe, RequestTiming, Resources, Timeline
from pydantic import JsonValue
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvat_engine_transformers import actions, proof
from kvat_engine_transformers.failures import translated
from kvat_engine_transformers.memory import cache_bytes, peak_device_bytes, peak_host_bytes
from kvat_engine_transformers.models import Source, has_tokenizer, resolve
from kvat_engine_transformers.prompts import prompt_ids, text_ids
from kvat_engine_transformers.random_model import build_random_model

PROOF_TOKENS = 3
"""Enough for a prefill and two decode steps; a static cache has the scenario's slots all the same."""

# What generate leaves behind on the model: the largest static cache so far, and compiled code with its configuration.
_LEFT_BEHIND = ("_previous_max_cache_length", "_compiled_call", "_last_compile_config")


class TokenClock:
    """A streamer that notes when tokens reach the host; the first thing it gets is the prompt."""

    def __init__(self) -> None:
        self.times_ns: list[int] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times_ns.append(time.perf_counter_ns())

    def end(self) -> None:
        pass


class Call(NamedTuple):
    """One call of generate with its times on the host."""

    output: Any
    prompt_tokens: int
    start_ns: int
    token_ns: list[int]
    end_ns: int
    compilations: int


class TransformersAdapter(EngineAdapter):
    """Executes recipes by calling `generate`."""

    _model: PreTrainedModel
    _recipe: Recipe

    def __init__(self) -> None:
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._cache_bytes: int | None = None

    def load_model(
        self,
        model_id: str,
        dtype: str | None,
        device: str,
        attn_backend: str | None,
        extra: Mapping[str, JsonValue],
    ) -> None:
        if threads := extra["threads"]:
            torch.set_num_threads(int(str(threads)))
        local = bool(extra["local_files_only"])
        revision = None if extra["revision"] is None else str(extra["revision"])
        source = resolve(model_id, revision, allow_download=not local)
        options = {"dtype": getattr(torch, str(dtype)), "device": device, "attention": str(attn_backend)}
        with translated():
            self._model = _load(source, **options)
        if source.kind != "random" and has_tokenizer(source.path):
            self._tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)

    def make_prompt(self, source: PromptSource, tokens: int, batch: int, nonce: int) -> torch.Tensor:
        special = self._special_ids()
        text = [] if self._tokenizer is None else text_ids(source, self._encode, special)
        ordinary = [token for token in range(self._vocabulary()) if token not in special]
        rows = prompt_ids(text, ordinary, tokens=tokens, batch=batch, nonce=nonce)
        return torch.tensor(rows, device=self._model.device)

    def prepare_cache(self, strategy: Recipe) -> None:
        if any(name in vars(self._model) for name in _LEFT_BEHIND[1:]):
            torch.compiler.reset()
        for name in _LEFT_BEHIND:
            vars(self._model).pop(name, None)
        self._cache_bytes = None
        self._recipe = strategy
        gc.collect()

    def run_decode(self, prompt: torch.Tensor, max_new_tokens: int) -> Timeline:
        return _timeline(self._generate(prompt, max_new_tokens))

    def run_prefill(self, prompt: torch.Tensor, max_new_tokens: int = 0) -> Timeline:
        # generate cannot do less than one token.
        return _timeline(self._generate(prompt, max(1, max_new_tokens)))

    def applied(self, prompt: torch.Tensor) -> Applied:
        with translated(), actions.entered(self._recipe):
            seen = proof.observe(self._model, prompt, self._arguments(PROOF_TOKENS), compiles=self._recipe.compiles)
        return proof.compare(seen, self._recipe)

    def measure_resources(self) -> Resources:
        return Resources(
            processes=("worker",),
            peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=peak_device_bytes(self._model.device),
            kv_cache_bytes=self._cache_bytes,
        )

    def cleanup(self) -> None:
        del self._model
        self._tokenizer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _arguments(self, max_new_tokens: int) -> dict[str, Any]:
        """The recipe's arguments for another number of tokens, and what makes that number exact."""
        return {**actions.arguments(self._recipe), "max_new_tokens": max_new_tokens, "eos_token_id": None}

    def _generate(self, prompt: torch.Tensor, max_new_tokens: int) -> Call:
        arguments = self._arguments(max_new_tokens)
        # On mps a cache that is handed back switches on its recording, which would cost time at each step.
        arguments["return_dict_in_generate"] = self._model.device.type != "mps"
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        clock = TokenClock()
        graphs = proof.compiled_graphs()
        _synchronize(self._model.device)
        with translated(), actions.entered(self._recipe):
            start_ns = time.perf_counter_ns()
            output = self._model.generate(**inputs, **arguments, streamer=clock)
            end_ns = time.perf_counter_ns()
        tokens, cache = _unpack(output)
        if cache is not None:
            self._cache_bytes = cache_bytes(cache)
            _require_slots(cache, actions.slots(self._recipe), prompt.shape[1] + max_new_tokens)
        return Call(tokens, prompt.shape[1], start_ns, clock.times_ns[1:], end_ns, proof.compiled_graphs() - graphs)

    def _encode(self, text: str) -> list[int]:
        assert self._tokenizer is not None
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _special_ids(self) -> frozenset[int]:
        return frozenset(() if self._tokenizer is None else self._tokenizer.all_special_ids)

    def _vocabulary(self) -> int:
        size = int(self._model.config.get_text_config(decoder=True).vocab_size)
        return size if self._tokenizer is None else min(size, len(self._tokenizer))
