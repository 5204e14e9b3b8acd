"""The heavy half: one loaded model in one worker process."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel, PreTrainedTokenizerBase

from kvat_core.engine import Answer, EngineAdapter, EngineError
from kvat_core.schema import Applied, PromptSource, Recipe, RequestTiming, Resources, Timeline
from kvat_engine_transformers.calling import actions, batching, leftovers, registration
from kvat_engine_transformers.calling.clocks import TokenClock, clock_for, synchronize
from kvat_engine_transformers.calling.failures import translated
from kvat_engine_transformers.calling.kept import cache_of
from kvat_engine_transformers.calling.prompts import model_inputs, prompt_ids, text_ids, unpadded
from kvat_engine_transformers.measuring import forcing, memory
from kvat_engine_transformers.model.models import Source, load_tokenizer, resolve
from kvat_engine_transformers.model.quantisation import packed_by
from kvat_engine_transformers.model.random_model import build_random_model
from kvat_engine_transformers.outputs import handover
from kvat_engine_transformers.proving import live, observation, proof
from kvat_engine_transformers.settings import reading
from kvat_engine_transformers.settings.recipes import STEP_TOKENS

PROOF_TOKENS = 3
"""Enough for a prefill and two decode steps; a static cache has the scenario's slots all the same."""


class Call(NamedTuple):
    """One call with its times, seconds from its start."""

    tokens: torch.Tensor
    """Prompt and output, batch × tokens."""
    prompt: torch.Tensor
    clock: Literal["host", "device"]
    token_s: list[list[float]]
    """Of each request; where all move in step, once."""
    duration_s: float
    compilations: int


class TransformersAdapter(EngineAdapter):
    """Executes recipes by calling `generate`."""

    model: PreTrainedModel
    """The live model; there after `load_model`."""

    def __init__(self) -> None:
        self._prepared: Recipe | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._ordinary_ids: list[int] = []
        self._text_ids: dict[PromptSource, list[int]] = {}
        self._cache_bytes: int | None = None
        self._predicted_cache_bytes: int | None = None
        self._ready_host_bytes: int | None = None
        self._graphs_before = 0
        self._clock: TokenClock | None = None
        self._watch: batching.Watch | None = None

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
        revision = None if extra["revision"] is None else str(extra["revision"])
        source = resolve(model_id, revision, allow_download=False)
        options = {"dtype": getattr(torch, str(dtype)), "device": device, "attention": str(attn_backend)}
        with translated():
            self.model = _load(source, **options, device_map=extra.get("device_map"))
        if self.model.device.type == "cuda":
            # Events are recorded on the current device, whichever device the work is on.
            torch.cuda.set_device(self.model.device)
        self._tokenizer = load_tokenizer(source)
        special = self._special_ids()
        self._ordinary_ids = [token for token in range(self._vocabulary()) if token not in special]
        self._text_ids.clear()

    def make_prompt(self, source: PromptSource, tokens: Sequence[int], nonce: int) -> torch.Tensor:
        self._clock = self._watch = None  # the call before is over
        rows = prompt_ids(self._ids(source), self._ordinary_ids, tokens=tokens, nonce=nonce)
        with translated():
            return torch.tensor(rows, device=self.model.device)

    def prepare_cache(self, strategy: Recipe) -> None:
        leftovers.forget_length(self.model)
        if strategy != self._prepared:
            leftovers.forget_compiled(self.model)
            self._graphs_before = live.compiled_graphs()
        self._cache_bytes = self._predicted_cache_bytes = None
        self._prepared = strategy
        for device in self._devices():
            memory.start_peaks(device)
        self._ready_host_bytes = memory.resident_bytes()

    def run_decode(self, prompt: torch.Tensor, max_new_tokens: int) -> Timeline:
        return _timeline(self.generate(prompt, max_new_tokens))

    def run_prefill(self, prompt: torch.Tensor, max_new_tokens: int = 0) -> Timeline:
        # generate cannot do less than one token.
        return _timeline(self.generate(prompt, max(1, max_new_tokens)))

    def generate(self, prompt: torch.Tensor, max_new_tokens: int) -> Call:
        """One call by the prepared recipe, with the instrument: what `run_decode` times.

        Raises:
            EngineError: it failed in a known way, or the cache is not as the recipe says.
        """
        by_recipe = self._generate_batch if self._batched else self._generate
        with translated(), actions.entered(self._recipe):
            return by_recipe(prompt, max_new_tokens)

    def applied(self, prompt: torch.Tensor) -> Applied:
        if self._batched:
            reason = batching.unserved(self.model, self._recipe.arguments)
            if reason is not None:
                raise EngineError("unsupported", reason)
        with translated(), actions.entered(self._recipe):
            seen = observation.observe(
                self.model, prompt, self._recipe, self._arguments(PROOF_TOKENS), self._graphs_before
            )
            if self._batched:
                # `generate_batch` hands back no predictions, so that one prompt is asked again for them.
                row = np.array(unpadded(prompt)[:1], dtype=np.int64)
                predicted, _ = forcing.score(self.model, row, self._arguments(PROOF_TOKENS), None, batched=True)
                observation.require_numbers(torch.from_numpy(predicted), self.model.dtype)
        return proof.compare(seen, self._recipe)

    def token_ids(self, prompt: torch.Tensor) -> NDArray[np.int64]:
        return np.asarray(prompt.cpu().numpy(), dtype=np.int64)

    def score(
        self, ids: NDArray[np.int64], steps: int, forced: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        leftovers.forget_length(self.model)
        with translated(), actions.entered(self._recipe):
            return forcing.score(self.model, ids, self._arguments(steps), forced, batched=self._batched)

    def score_at_once(self, ids: NDArray[np.int64], forced: NDArray[np.int64]) -> NDArray[np.float32]:
        with translated():
            return forcing.score_at_once(self.model, ids, forced)

    def answer(self, prompt: torch.Tensor, max_new_tokens: int, longest_tokens: int) -> Answer:
        handed_over = handover.imported(self._recipe, STEP_TOKENS)
        pinned = {} if reading.slots(self._recipe) is None else {"max_cache_len": longest_tokens}
        # What a captured graph of `generate_batch` computes cannot be looked at without changing it.
        with translated(), nullcontext(None) if self._batched else forcing.witnessed(self.model) as scores:
            output = handed_over.generate(self.model, max_new_tokens=max_new_tokens, **model_inputs(prompt), **pinned)
        if output.shape[1] <= prompt.shape[1]:
            raise EngineError("no_output", "the code that is handed over answered nothing")
        return Answer(tokens=digest(output, prompt), predictions=None if scores is None else scores())

    def measure_resources(self) -> Resources:
        device = self.model.device
        cards = self._devices() if device.type == "cuda" else []
        reserved = sum(map(torch.cuda.max_memory_reserved, cards)) if cards else None
        return Resources(
            processes=("worker",),
            peak_host_bytes=memory.peak_host_bytes(),
            ready_host_bytes=self._ready_host_bytes,
            pinned_host_bytes=memory.pinned_bytes(device),
            peak_device_bytes=reserved,
            device_allocated_bytes=sum(map(torch.cuda.max_memory_allocated, cards)) if cards else None,
            device_reserved_bytes=reserved,
            kv_cache_bytes=self._cache_bytes,
            kv_cache_predicted_bytes=self._predicted_cache_bytes,
        )

    def tokens_seen(self) -> int | None:
        running = self._clock or self._watch
        return 0 if running is None else running.seen()

    def cleanup(self) -> None:
        # The process ends with the launch, and with it whatever torch still holds.
        del self.model
        self._tokenizer = None

    def _devices(self) -> list[torch.device]:
        """Those that hold weights."""
        return list(dict.fromkeys(parameter.device for parameter in self.model.parameters()))

    @property
    def _batched(self) -> bool:
        return self._recipe.call == "generate_batch"

    @property
    def _recipe(self) -> Recipe:
        assert self._prepared is not None, "prepare_cache comes first"
        return self._prepared

    def _arguments(self, max_new_tokens: int) -> dict[str, Any]:
        """The recipe's arguments for another number of tokens, and what makes that number exact."""
        endless = batching.NO_END_OF_SEQUENCE if self._batched else None
        return {**actions.arguments(self._recipe), "max_new_tokens": max_new_tokens, "eos_token_id": endless}

    def _generate_batch(self, prompt: torch.Tensor, max_new_tokens: int) -> Call:
        rows, arguments = unpadded(prompt), self._arguments(max_new_tokens)
        graphs = live.compiled_graphs()
        with batching.watched(self.model) as self._watch:
            synchronize(self.model.device)
            start_ns = time.perf_counter_ns()
            answers = batching.generate(self.model, rows, arguments)
            duration_s = (time.perf_counter_ns() - start_ns) / 1e9
            pool = self._watch.pool
        self._cache_bytes = None if pool is None else pool.nbytes
        tokens = [row + answer.output_ids for row, answer in zip(prompt.tolist(), answers, strict=True)]
        return Call(
            tokens=torch.tensor(tokens),
            prompt=prompt,
            clock="host",
            token_s=[[at - start_ns / 1e9 for at in answer.token_s] for answer in answers],
            duration_s=duration_s,
            compilations=live.compiled_graphs() - graphs,
        )

    def _generate(self, prompt: torch.Tensor, max_new_tokens: int) -> Call:
        arguments = self._arguments(max_new_tokens)
        # On mps a cache that is handed back switches on its recording, which would cost time at each step.
        arguments["return_dict_in_generate"] = self.model.device.type != "mps"
        generate: Any = self.model.generate
        graphs = live.compiled_graphs()
        inputs = model_inputs(prompt)
        self._clock = clock = clock_for(self.model.device)
        synchronize(self.model.device)
        start_ns = time.perf_counter_ns()
        clock.start()
        output = generate(**inputs, **arguments, **clock.arguments())
        synchronize(self.model.device)
        duration_s = (time.perf_counter_ns() - start_ns) / 1e9
        token_s = clock.token_s()
        tokens, cache = _unpack(output)
        self._look_at(cache, prompt, max_new_tokens)
        compilations = live.compiled_graphs() - graphs
        return Call(tokens, prompt, clock.kind, [token_s], duration_s, compilations)

    def _look_at(self, cache: Cache | None, prompt: torch.Tensor, output_tokens: int) -> None:
        """Size up the cache that a call has left, beside what it should be.

        Raises:
            EngineError: it has other slots than the recipe says.
        """
        batch_size, prompt_tokens = prompt.shape
        self._predicted_cache_bytes = memory.predicted_cache_bytes(
            self.model.config,
            self._recipe.arguments,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            batch_size=batch_size,
            element_bytes=self.model.dtype.itemsize,
        )
        if cache is not None:
            self._cache_bytes = memory.cache_bytes(cache)
            if wrong := proof.wrong_slots(cache, self._recipe):
                raise EngineError("not_applied", wrong)

    def _ids(self, source: PromptSource) -> list[int]:
        """Ids of a prompt's text, tokenised once."""
        if self._tokenizer is None:
            return []
        if source not in self._text_ids:
            self._text_ids[source] = text_ids(source, self._encode, self._special_ids())
        return self._text_ids[source]

    def _encode(self, text: str) -> list[int]:
        assert self._tokenizer is not None
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _special_ids(self) -> frozenset[int]:
        return frozenset(() if self._tokenizer is None else self._tokenizer.all_special_ids)

    def _vocabulary(self) -> int:
        size = int(self.model.config.get_text_config(decoder=True).vocab_size)
        return size if self._tokenizer is None else min(size, len(self._tokenizer))


def _load(source: Source, *, dtype: torch.dtype, device: str, attention: str, device_map: JsonValue) -> PreTrainedModel:
    registration.register(attention)
    if source.kind == "random":
        return build_random_model(source.path, dtype=dtype, device=device, attention=attention)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.path,
        output_loading_info=True,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        **({} if device_map is None else {"device_map": device_map}),
    )
    model, found = loaded
    # Buffers of plain models are computed as well as stored; those of packed ones are their weights.
    weights = model.state_dict() if packed_by(model) is not None else dict(model.named_parameters())
    if missing := sorted(found["missing_keys"] & weights.keys()):
        # Transformers makes them up, and says so in a warning.
        lacking = f"the model's files lack {len(missing)} of its weights, as {missing[0]}"
        raise EngineError("error", f"{lacking}; fetch them again, or mend its config.json")
    if device_map is None:
        return cast("PreTrainedModel", model.to(device).eval())
    elsewhere = sum(parameter.device.type != torch.device(device).type for parameter in model.parameters())
    if elsewhere:
        raise EngineError(
            "oom_device",
            f"the devices do not hold the model: device_map={device_map} leaves {elsewhere} weights elsewhere",
        )
    return cast("PreTrainedModel", model.eval())


def digest(tokens: torch.Tensor, prompt: torch.Tensor) -> str:
    """Of what was generated after a prompt, by which two answers are compared without telling what they say."""
    return hashlib.sha256(repr(tokens[:, prompt.shape[1] :].tolist()).encode()).hexdigest()


def _timeline(call: Call) -> Timeline:
    """Requests of a batch that share their steps share their times, which are told once."""
    requests = (
        RequestTiming(
            prompt_tokens=prompt_tokens,
            output_tokens=call.tokens.shape[1] - call.prompt.shape[1],
            ttft_s=token_s[0],
            e2e_s=token_s[-1],
            token_gaps_s=tuple(later - earlier for earlier, later in pairwise(token_s)),
            count=count,
        )
        for prompt_tokens, count, token_s in _told(call)
    )
    return Timeline(
        clock=call.clock,
        duration_s=call.duration_s,
        requests=tuple(requests),
        compilations=call.compilations,
    )


def _told(call: Call) -> list[tuple[int, int, list[float]]]:
    """Prompt tokens of requests that share their figures, their number, and when their tokens came."""
    lengths = [len(row) for row in unpadded(call.prompt)]
    if len(call.token_s) == 1:
        return [(tokens, count, call.token_s[0]) for tokens, count in Counter(lengths).items()]
    return [(tokens, 1, token_s) for tokens, token_s in zip(lengths, call.token_s, strict=True)]


def _unpack(output: Any) -> tuple[torch.Tensor, Cache | None]:
    if isinstance(output, torch.Tensor):
        return output, None
    return output.sequences, cache_of(output)
