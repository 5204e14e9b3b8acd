"""Two scripted engines without a model: to try kvat, to test it, and to read as an example.

`FakeEngine` ("fake") behaves like a library in the worker's own process: tokens, one time per
token, several candidates per load, memory known. `FakeServerEngine` ("fake-server") behaves like
a server: text, totals only, one setting in the environment, the context size fixed at load,
memory unknown. Nothing is computed and nobody sleeps: a virtual clock gives times that follow
from the settings, with a little noise from the prompt's nonce, so equal calls take equal times.

The model id chooses the behaviour, e.g. ``fake:crash`` or ``fake-server:crash``:

    tiny         healthy; one candidate decodes 25 % faster than the default
    flat         healthy; all candidates are equally fast, so a tie is right
    chatty       healthy, but writes to standard output and error, more than a pipe holds
    crash        one candidate kills its process
    oom          one candidate runs out of device memory
    hang         one candidate does not come back for an hour
    misapplied   one candidate reads back something else than its recipe says
    wrong-count  one candidate generates a token less than asked for
    nan          one candidate returns times that are no numbers
    small-memory  healthy, but its memory holds 2929 tokens of the default cache, of a model that could take 4096
    trained      healthy, with weights that predict something, so that fidelity and leaks are looked at: a quantised
                 cache is close, and a quantised one with the eager kernel is not
    wrong-output as trained, but the best candidate forgets how its prompt began
    leak         as trained, but the best candidate is confused by longer requests before
    secret       one candidate raises an exception of its own whose text contains the prompt
    all-fail     every candidate fails

The one candidate is never the default, the best, or an alias of either, unless it is said to be the best.
"""

from __future__ import annotations

import hashlib
import math
import os
import pprint
import random
import signal
import sys
import time
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import JsonValue

from kvat_core.engine import Answer, Engine, EngineAdapter, EngineError, Probe, SpaceRequest
from kvat_core.errors import UsageError
from kvat_core.schema import (
    Applied,
    Knob,
    KnobValue,
    ModelRef,
    ModelShape,
    Plan,
    PromptSource,
    Recipe,
    RequestTiming,
    Resources,
    Scenario,
    Target,
    Timeline,
)

if TYPE_CHECKING:  # the light half must not import what only predictions need
    import numpy as np
    from numpy.typing import NDArray

_SHAPE = ModelShape(
    architecture="fake",
    layers=2,
    attention=("full", "full"),
    kv_heads=2,
    head_dim=16,
    max_context_tokens=4096,
    dtype="float32",
    weight_bytes=64 * 2**20,
    weights="random",
)
_KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head dimension, bytes of a float32
_PREFILL_TOKENS_PER_S = 20_000.0
_TOKEN_GAP_S = 0.002
_TOKEN_GAP_GROWTH_S = 1e-7  # per position already in the cache
_NOISE = 0.003  # standard deviation of a call's duration, relative
_SERVER_FLASH = "FAKE_SERVER_FLASH"
_VOCABULARY = 32


@dataclass(frozen=True)
class _Prompt:
    """A batch of texts; a token is a word."""

    nonce: int
    texts: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return max(self.lengths)


# What each setting does ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Effect:
    """Factors on the speed of both phases and on the size of the cache."""

    prefill: float = 1.0
    decode: float = 1.0
    kv: float = 1.0


_EFFECTS = {
    ("cache", "static"): _Effect(decode=1.25),
    ("cache", "offloaded"): _Effect(decode=0.6, kv=0.25),
    ("cache", "quantized"): _Effect(decode=0.9, kv=0.25),
    ("kernel", "eager"): _Effect(prefill=0.7, decode=0.85),
    ("flash", "off"): _Effect(prefill=0.7, decode=0.85),
    ("draft", "ngram"): _Effect(decode=1.25),
    ("kv_type", "q8"): _Effect(decode=0.95, kv=0.5),
}
"""Settings as they really run; one that is not listed has no effect."""


# What goes wrong ----------------------------------------------------------------------------------


def _crash(prompt: _Prompt) -> None:
    signal.raise_signal(signal.SIGSEGV)


def _run_out_of_memory(prompt: _Prompt) -> None:
    raise EngineError("oom_device", "the scripted device is full")


def _hang(prompt: _Prompt) -> None:
    time.sleep(3600)


def _refuse(prompt: _Prompt) -> None:
    raise EngineError("error", "the scripted engine fails whatever it is asked")


def _tell_the_prompt(prompt: _Prompt) -> None:
    raise RuntimeError(f"cannot decode {prompt.texts[0]!r}")


def _lose_a_token(timing: RequestTiming) -> RequestTiming:
    return timing.model_copy(update={"output_tokens": timing.output_tokens - 1})


def _lose_the_times(timing: RequestTiming) -> RequestTiming:
    return timing.model_copy(update={"ttft_s": math.nan, "e2e_s": math.nan})


@dataclass(frozen=True)
class _Behaviour:
    """A model's script. What goes wrong does so for one candidate, or for everyone."""

    flat: bool = False
    chatty: bool = False
    everyone: bool = False
    fails: Callable[[_Prompt], None] | None = None
    spoils: Callable[[RequestTiming], RequestTiming] | None = None
    mismatches: tuple[str, ...] = ()
    kv_bytes: int | None = None
    """Memory that there is for the cache; None = enough."""
    trained: bool = False
    best_is: Literal["right", "forgetful", "leaking"] = "right"


_BEHAVIOURS = {
    "tiny": _Behaviour(),
    "flat": _Behaviour(flat=True),
    "chatty": _Behaviour(chatty=True),
    "crash": _Behaviour(fails=_crash),
    "oom": _Behaviour(fails=_run_out_of_memory),
    "hang": _Behaviour(fails=_hang),
    "misapplied": _Behaviour(mismatches=("scripted: the engine runs something else than the recipe says",)),
    "wrong-count": _Behaviour(spoils=_lose_a_token),
    "nan": _Behaviour(spoils=_lose_the_times),
    "small-memory": _Behaviour(kv_bytes=1_500_000),
    "trained": _Behaviour(trained=True),
    "wrong-output": _Behaviour(trained=True, best_is="forgetful"),
    "leak": _Behaviour(trained=True, best_is="leaking"),
    "secret": _Behaviour(fails=_tell_the_prompt),
    "all-fail": _Behaviour(fails=_refuse, everyone=True),
}


def _chatter() -> None:
    """Write as careless libraries do, from Python and, past `sys.stdout`, from C."""
    print("scripted chatter on standard output")
    print("scripted chatter on standard error", file=sys.stderr)
    for descriptor in (1, 2):
        os.write(descriptor, b"scripted chatter " * 8192)


# The light halves ---------------------------------------------------------------------------------


class _ScriptedEngine(Engine):
    """What both faces have in common."""

    def probe(self, device: str | None, options: Mapping[str, str]) -> Probe:
        if device not in (None, "cpu"):
            raise UsageError(f"engine {self.name!r} has no device {device!r}; use --device cpu")
        return Probe(device="cpu", versions={"kvat-core": version("kvat-core")})

    def describe(self, model: ModelRef, device: str, options: Mapping[str, str]) -> ModelShape:
        scheme, _, behaviour = model.id.partition(":")
        if scheme != self.name or behaviour not in _BEHAVIOURS:
            known = ", ".join(f"{self.name}:{name}" for name in _BEHAVIOURS)
            raise UsageError(f"engine {self.name!r} has no model {model.id!r}; choose one of {known}")
        trained = _BEHAVIOURS[behaviour].trained
        return _SHAPE.model_copy(update={"weights": "checkpoint", "sha256": "0" * 64}) if trained else _SHAPE

    def instrument(self) -> Sequence[str]:
        return ("virtual clock: nothing is computed, the times follow from the settings",)

    def snippet(self, plan: Plan) -> Mapping[str, str]:
        winner = plan.require_winner()
        target = Target(
            model=ModelRef(id=plan.model.id, revision=plan.model.revision),
            device=plan.machine.device,
            threads=plan.machine.threads,
        )
        runs = [
            (scenario.model_dump(), self.recipe(winner.settings, scenario, target).model_dump(mode="json"))
            for scenario in plan.profile.scenarios
        ]
        listing = pprint.pformat(runs, width=100, sort_dicts=False)
        return {"snippet.py": _SNIPPET.format(engine=type(self).__name__, runs=listing)}


class FakeEngine(_ScriptedEngine):
    """The in-process face."""

    name = "fake"
    own_models = ("fake:tiny", "fake:")

    def space(self, shape: ModelShape, probe: Probe, request: SpaceRequest) -> Sequence[Knob]:
        return (
            Knob(
                name="cache",
                default="dynamic",
                values=(
                    KnobValue(name="dynamic", space="safe"),
                    KnobValue(name="static", space="safe", simplicity=1),
                    KnobValue(name="offloaded", space="default", simplicity=1),
                    KnobValue(name="quantized", space="full", simplicity=2, lossy=True),
                    KnobValue(name="paged", space="safe", simplicity=2, unavailable="the scripted device has no pages"),
                ),
            ),
            Knob(
                name="kernel",
                default="auto",
                values=(
                    KnobValue(name="auto", space="safe"),
                    KnobValue(name="flash", space="safe", simplicity=1),
                    KnobValue(name="eager", space="safe", simplicity=1),
                ),
            ),
            Knob(
                name="graph",
                default="off",
                when={"cache": ("static",)},
                values=(
                    KnobValue(name="off", space="safe"),
                    KnobValue(name="on", space="default", simplicity=2, compiles=True),
                ),
            ),
        )

    def check(self, settings: Mapping[str, str], shape: ModelShape, probe: Probe) -> str | None:
        if settings["graph"] == "on" and settings["kernel"] == "eager":
            return "a graph cannot be captured with the eager kernel"
        return None

    def reference(
        self, settings: Mapping[str, str], incumbent: Mapping[str, str], shape: ModelShape
    ) -> Mapping[str, str] | None:
        return None if shape.weights == "random" else {"cache": "dynamic", "kernel": "auto", "graph": "off"}

    def recipe(self, settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
        compiles = settings["graph"] == "on"
        slots = scenario.total_tokens if settings["cache"] == "static" else None
        return Recipe(
            load=_load_arguments(target, {"graph": settings["graph"], "threads": target.threads}),
            setup={"kernel": settings["kernel"]},
            call="generate",
            arguments={"cache": settings["cache"], "slots": slots},
            warmup=2 if compiles else 1,
            compiles=compiles,
        )

    def adapter(self, scratch: Path) -> EngineAdapter:
        return _InProcessAdapter()


class FakeServerEngine(_ScriptedEngine):
    """The server-like face."""

    name = "fake-server"
    placement = "children"
    own_models = ("fake-server:tiny", "fake-server:")

    def space(self, shape: ModelShape, probe: Probe, request: SpaceRequest) -> Sequence[Knob]:
        return (
            Knob(
                name="flash",
                default="auto",
                values=(
                    KnobValue(name="auto", space="safe"),
                    KnobValue(name="on", space="safe", simplicity=1),
                    KnobValue(name="off", space="safe", simplicity=1),
                ),
            ),
            Knob(
                name="kv_type",
                default="f16",
                when={"flash": ("on",)},
                values=(
                    KnobValue(name="f16", space="safe"),
                    KnobValue(name="q8", space="full", simplicity=1, lossy=True),
                    KnobValue(name="q4", space="full", simplicity=1, lossy=True, unavailable="built without 4 bits"),
                ),
            ),
            Knob(
                name="draft",
                default="off",
                values=(KnobValue(name="off", space="safe"), KnobValue(name="ngram", space="safe", simplicity=1)),
            ),
        )

    def check(self, settings: Mapping[str, str], shape: ModelShape, probe: Probe) -> str | None:
        if settings["draft"] == "ngram" and settings["flash"] == "off":
            return "drafts can only be verified with flash attention"
        return None

    def recipe(self, settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
        context_tokens = math.ceil(scenario.total_tokens / 256) * 256
        return Recipe(
            environment={_SERVER_FLASH: settings["flash"]},
            load=_load_arguments(target, {"context_tokens": context_tokens, "kv_type": settings["kv_type"]}),
            call="completion",
            arguments={"draft": settings["draft"]},
        )

    def adapter(self, scratch: Path) -> EngineAdapter:
        return _ServerAdapter()


def _load_arguments(target: Target, extra: dict[str, JsonValue]) -> dict[str, JsonValue]:
    return {"model_id": target.model.id, "dtype": None, "device": target.device, "attn_backend": None, "extra": extra}


# The heavy halves ---------------------------------------------------------------------------------


class _ScriptedAdapter(EngineAdapter):
    """What both faces have in common; a face says what really runs and what its clock can tell."""

    _clock: ClassVar[Literal["host", "engine"]]
    """Who reads the times; only the host sees single tokens."""
    _suspect: ClassVar[dict[str, str]]
    """What the one candidate with which something goes wrong really runs."""

    def load_model(
        self,
        model_id: str,
        dtype: str | None,
        device: str,
        attn_backend: str | None,
        extra: Mapping[str, JsonValue],
    ) -> None:
        self._behaviour = _BEHAVIOURS[model_id.partition(":")[2]]
        self._extra = extra
        if self._behaviour.chatty:
            _chatter()

    def make_prompt(self, source: PromptSource, tokens: Sequence[int], nonce: int) -> _Prompt:
        words = (source.value or "").split()
        texts = (" ".join([f"{nonce}.{row}", *islice(cycle(words), one - 1)]) for row, one in enumerate(tokens))
        return _Prompt(nonce, tuple(texts), tuple(tokens))

    def prepare_cache(self, strategy: Recipe) -> None:
        self._recipe = strategy
        self._running = self._take(strategy)
        self._kv_bytes = self._peak_kv_bytes = 0
        self._compiled: set[tuple[int, int]] = set()

    def run_decode(self, prompt: _Prompt, max_new_tokens: int) -> Timeline:
        behaviour = self._behaviour
        if behaviour.chatty:
            _chatter()
        if behaviour.fails and self._is_suspect():
            behaviour.fails(prompt)
        timeline = self._generate(prompt, max_new_tokens)
        if behaviour.spoils and self._is_suspect():
            return timeline.model_copy(update={"requests": tuple(map(behaviour.spoils, timeline.requests))})
        return timeline

    def tokens_seen(self) -> int | None:
        # Calls take no time, so one that lasts has delivered nothing yet.
        return 0 if self._clock == "host" else None

    def run_prefill(self, prompt: _Prompt, max_new_tokens: int = 0) -> Timeline:
        return self._generate(prompt, max_new_tokens)

    def applied(self, prompt: _Prompt) -> Applied:
        self._generate(prompt, 1)
        scripted = self._behaviour.mismatches if self._is_suspect() else ()
        return Applied(values={**self._running, "slots": self._slots()}, mismatches=(*self._mismatches(), *scripted))

    def cleanup(self) -> None:
        self._kv_bytes = 0

    @abstractmethod
    def _take(self, recipe: Recipe) -> dict[str, str]:
        """Set the recipe up and return the settings that really run."""

    @abstractmethod
    def _slots(self) -> int | None:
        """Positions reserved per request; None for a cache that grows."""

    @abstractmethod
    def _mismatches(self) -> tuple[str, ...]:
        """What really differs from the recipe."""

    def _is_suspect(self) -> bool:
        return self._behaviour.everyone or self._suspect.items() <= self._running.items()

    def _generate(self, prompt: _Prompt, output_tokens: int) -> Timeline:
        batch_size, positions = len(prompt.texts), prompt.tokens + output_tokens
        self._occupy(batch_size, positions)
        ttft_s, token_gaps_s = self._times(prompt, output_tokens)
        e2e_s = ttft_s + sum(token_gaps_s)
        requests = (
            RequestTiming(
                prompt_tokens=tokens,
                output_tokens=output_tokens,
                ttft_s=ttft_s,
                e2e_s=e2e_s,
                token_gaps_s=token_gaps_s if self._clock == "host" else None,
                count=count,
            )
            for tokens, count in Counter(prompt.lengths).items()
        )
        return Timeline(
            clock=self._clock,
            duration_s=e2e_s,
            requests=tuple(requests),
            compilations=self._compile((batch_size, positions)),
        )

    def _occupy(self, batch_size: int, positions: int) -> None:
        slots = self._slots() or positions
        if positions > slots:
            raise EngineError("error", f"{positions} tokens do not fit the {slots} slots of the cache")
        self._kv_bytes = round(_KV_BYTES_PER_TOKEN * slots * batch_size * self._effect().kv)
        if self._behaviour.kv_bytes is not None and self._kv_bytes > self._behaviour.kv_bytes:
            raise EngineError("oom_device", "the scripted device is full")
        self._peak_kv_bytes = max(self._peak_kv_bytes, self._kv_bytes)

    def _times(self, prompt: _Prompt, output_tokens: int) -> tuple[float, tuple[float, ...]]:
        """Time to first token, and the gaps after it, by the virtual clock."""
        effect, batch_size = self._effect(), len(prompt.texts)
        noise = random.Random(f"{prompt.nonce} {sorted(self._running.items())}")
        pace = noise.gauss(1.0, _NOISE)
        ttft_s = pace * prompt.tokens * batch_size / (_PREFILL_TOKENS_PER_S * effect.prefill)
        positions = range(prompt.tokens, prompt.tokens + output_tokens - 1)
        gaps_s = (_TOKEN_GAP_S + _TOKEN_GAP_GROWTH_S * batch_size * position for position in positions)
        return ttft_s, tuple(noise.gauss(pace, _NOISE) * gap_s / effect.decode for gap_s in gaps_s)

    def _effect(self) -> _Effect:
        if self._behaviour.flat:
            return _Effect()
        effects = [_EFFECTS.get(setting, _Effect()) for setting in self._running.items()]
        return _Effect(
            prefill=math.prod(effect.prefill for effect in effects),
            decode=math.prod(effect.decode for effect in effects),
            kv=math.prod(effect.kv for effect in effects),
        )

    def _compile(self, shape: tuple[int, int]) -> int:
        """Graphs compiled by this call: one for each new shape."""
        if not self._recipe.compiles or shape in self._compiled:
            return 0
        self._compiled.add(shape)
        return 1


class _InProcessAdapter(_ScriptedAdapter):
    _clock = "host"
    _suspect: ClassVar[dict[str, str]] = {"cache": "static", "kernel": "eager"}
    _best: ClassVar[dict[str, str]] = {"cache": "static", "kernel": "flash"}

    def load_model(
        self,
        model_id: str,
        dtype: str | None,
        device: str,
        attn_backend: str | None,
        extra: Mapping[str, JsonValue],
    ) -> None:
        super().load_model(model_id, dtype, device, attn_backend, extra)
        self._longest, self._latest = 0, ""

    def token_ids(self, prompt: _Prompt) -> NDArray[np.int64]:
        import numpy as np

        rows = [[zlib.crc32(word.encode()) % _VOCABULARY for word in text.split()] for text in prompt.texts]
        return np.array(rows, dtype=np.int64)

    def score(
        self, ids: NDArray[np.int64], steps: int, forced: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        import numpy as np

        seen, logprobs = [list(row) for row in ids.tolist()], []
        for step in range(steps):
            logprobs.append(np.stack([self._predict(row, ids.shape[1]) for row in seen]))
            chosen = logprobs[-1].argmax(axis=1) if forced is None else forced[:, step]
            for row, token in zip(seen, chosen.tolist(), strict=True):
                row.append(token)
        return np.stack(logprobs, axis=1), np.array([row[ids.shape[1] :] for row in seen], dtype=np.int64)

    def score_at_once(self, ids: NDArray[np.int64], forced: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.score(ids, forced.shape[1], forced)[0]

    def answer(self, prompt: _Prompt, max_new_tokens: int, longest_tokens: int) -> Answer:
        leaks = self._behaviour.best_is == "leaking" and self._is_best() and self._longest > prompt.tokens
        self._longest = max(self._longest, prompt.tokens)
        said = f"{self.score(self.token_ids(prompt), max_new_tokens, None)[1].tolist()}{self._latest if leaks else ''}"
        self._latest = prompt.texts[0]
        return Answer(tokens=hashlib.sha256(said.encode()).hexdigest())

    def _predict(self, tokens: Sequence[int], prompt_tokens: int) -> NDArray[np.float32]:
        """Log-probabilities of the next token: all tokens so far have their say, the first as the last."""
        import numpy as np

        forgets = self._behaviour.best_is == "forgetful" and self._is_best() and len(tokens) > prompt_tokens
        remembered = tokens[prompt_tokens // 10 :] if forgets else tokens
        random_numbers = np.random.default_rng(sum(remembered))
        logits = random_numbers.normal(0.0, 2.0, _VOCABULARY)
        if self._running["cache"] == "quantized":
            loss = 1.0 if self._running["kernel"] == "eager" else 0.01
            logits += loss * np.random.default_rng(len(tokens)).normal(0.0, 1.0, _VOCABULARY)
        predicted: NDArray[np.float32] = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
        return predicted

    def _is_best(self) -> bool:
        return self._best.items() <= self._running.items()

    def measure_resources(self) -> Resources:
        return Resources(
            processes=("worker",),
            peak_host_bytes=cast("int", _SHAPE.weight_bytes) + self._peak_kv_bytes,
            ready_host_bytes=_SHAPE.weight_bytes,
            kv_cache_bytes=self._kv_bytes,
        )

    def _take(self, recipe: Recipe) -> dict[str, str]:
        kernel = cast("str", recipe.setup["kernel"])
        return {
            "cache": cast("str", recipe.arguments["cache"]),
            "kernel": "flash" if kernel == "auto" else kernel,
            "graph": cast("str", self._extra["graph"]),
        }

    def _slots(self) -> int | None:
        return cast("int | None", self._recipe.arguments["slots"])

    def _mismatches(self) -> tuple[str, ...]:
        return ()


class _ServerAdapter(_ScriptedAdapter):
    _clock = "engine"
    _suspect: ClassVar[dict[str, str]] = {"flash": "off"}

    def measure_resources(self) -> Resources:
        return Resources(processes=("scripted server",))

    def _take(self, recipe: Recipe) -> dict[str, str]:
        return {
            "flash": "off" if self._flash() == "off" else "on",
            "kv_type": cast("str", self._extra["kv_type"]),
            "draft": cast("str", recipe.arguments["draft"]),
        }

    def _slots(self) -> int | None:
        return cast("int", self._extra["context_tokens"])

    def _mismatches(self) -> tuple[str, ...]:
        wanted, found = self._recipe.environment[_SERVER_FLASH], self._flash()
        return () if wanted == found else (f"{_SERVER_FLASH}: the recipe says {wanted}, the server runs {found}",)

    def _flash(self) -> str:
        return os.environ.get(_SERVER_FLASH, "auto")


# What a plan becomes ------------------------------------------------------------------------------

_SNIPPET = '''\
"""The winner of this plan, run on the scripted engine."""

import os
from pathlib import Path

from kvat_core.fake import {engine}
from kvat_core.schema import PromptSource, Recipe, Scenario

RUNS = \\
{runs}

for scenario, recipe in RUNS:
    os.environ.update(recipe["environment"])
    adapter = {engine}().adapter(Path())
    adapter.load_model(**recipe["load"])
    adapter.prepare_cache(Recipe(**recipe))
    text = PromptSource(kind="text", value="any text will do")
    prompt = adapter.make_prompt(text, Scenario(**scenario).prompt_lengths, nonce=0)
    request = adapter.run_decode(prompt, scenario["output_tokens"]).requests[-1]
    adapter.cleanup()
    decode_tps = scenario["batch_size"] * (request.output_tokens - 1) / (request.e2e_s - request.ttft_s)
    print(
        f"prompt_tokens={{request.prompt_tokens}} output_tokens={{request.output_tokens}} "
        f"batch_size={{scenario['batch_size']}} ttft_s={{request.ttft_s:.6f}} decode_tps={{decode_tps:.3f}}"
    )
'''
