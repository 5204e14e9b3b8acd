"""An engine on which everything goes wrong that can: a candidate for each fault, and two that are sound.

The clock is the fake engine's; what a fault does is real.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kvat_core.engine import EngineAdapter, Probe, SpaceRequest
from kvat_core.fake import FakeEngine
from kvat_core.schema import Knob, KnobValue, ModelShape, Recipe, RequestTiming, Scenario, Target, Timeline

TOKENS_BEFORE_A_HANG = 2
CONTROL_GROUP = "KVAT_TEST_CONTROL_GROUP"
"""Variable with the folder of a control group whose memory is limited; without it the address space is."""


def segv() -> None:
    signal.raise_signal(signal.SIGSEGV)


def abort() -> None:
    os.abort()


def leave() -> None:
    os._exit(0)


def hang() -> None:
    time.sleep(3600)


def ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hang()


def leave_a_grandchild_with_the_pipes() -> None:
    if os.fork() == 0:
        os.setsid()
        hang()
    os._exit(3)


def flood() -> None:
    """Write 1 GB to standard error."""
    block = b"x" * 2**20
    for _ in range(1000):
        os.write(2, block)
    raise RuntimeError("flooded")


def allocate() -> None:
    """Take memory until the kernel says no, in its own way."""
    group = os.environ.get(CONTROL_GROUP)
    if group is None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    else:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    taken = []
    while True:
        taken.append(bytearray(16 * 2**20))


def no_numbers(timing: RequestTiming) -> RequestTiming:
    return timing.model_copy(update={"ttft_s": math.nan, "e2e_s": math.nan})


def before_the_start(timing: RequestTiming) -> RequestTiming:
    return timing.model_copy(update={"ttft_s": -timing.ttft_s})


def one_token_less(timing: RequestTiming) -> RequestTiming:
    return timing.model_copy(update={"output_tokens": timing.output_tokens - 1})


ACTS: dict[str, Callable[[], None]] = {
    "segv": segv,
    "abort": abort,
    "exit": leave,
    "hang-before": hang,
    "hang-after": hang,
    "ignore-sigterm": ignore_sigterm,
    "grandchild": leave_a_grandchild_with_the_pipes,
    "flood": flood,
    "allocate": allocate,
}
SPOILS: dict[str, Callable[[RequestTiming], RequestTiming]] = {
    "nan": no_numbers,
    "negative": before_the_start,
    "wrong-count": one_token_less,
}
FAULTS = (*ACTS, *SPOILS, "load")
SOUND = ("none", "fast")


class FaultEngine(FakeEngine):
    """One knob: what goes wrong."""

    name = "faults"
    own_models = ("faults:all",)

    def describe(self, model: Any, device: str, options: Mapping[str, str]) -> ModelShape:
        return ModelShape(architecture="fake", layers=1, attention=("full",), weights="random")

    def space(self, shape: ModelShape, probe: Probe, request: SpaceRequest) -> Sequence[Knob]:
        values = tuple(KnobValue(name=name, space="safe", simplicity=int(name != "none")) for name in (*SOUND, *FAULTS))
        return (Knob(name="fault", default="none", values=values),)

    def check(self, settings: Mapping[str, str], shape: ModelShape, probe: Probe) -> str | None:
        return None

    def recipe(self, settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
        fault = settings["fault"]
        fake = super().recipe(
            {"cache": "static" if fault == "fast" else "dynamic", "kernel": "auto", "graph": "off"},
            scenario,
            target.model_copy(update={"model": target.model.model_copy(update={"id": "fake:tiny"})}),
        )
        load = {**fake.load, "extra": {"graph": "off", "threads": None, "raises": fault == "load"}}
        return fake.model_copy(update={"load": load, "setup": {**fake.setup, "fault": fault}})

    def adapter(self, scratch: Path) -> EngineAdapter:
        return _adapter(super().adapter(scratch))


def _adapter(sound: EngineAdapter) -> EngineAdapter:
    class Faulty(type(sound)):  # type: ignore[misc]
        _tokens = 0

        def load_model(self, *, extra: Mapping[str, JsonValue], **load: Any) -> None:
            if extra["raises"]:
                raise RuntimeError("no weights")
            super().load_model(extra=extra, **load)

        def prepare_cache(self, strategy: Recipe) -> None:
            super().prepare_cache(strategy)
            self._fault = str(strategy.setup["fault"])

        def applied(self, prompt: Any) -> Any:
            seen = super().applied(prompt)
            return seen.model_copy(update={"values": {**seen.values, "fault": self._fault}})

        def run_decode(self, prompt: Any, max_new_tokens: int) -> Timeline:
            self._tokens = 0
            if self._fault == "hang-after":
                self._tokens = TOKENS_BEFORE_A_HANG
            if act := ACTS.get(self._fault):
                act()
            timeline: Timeline = super().run_decode(prompt, max_new_tokens)
            spoil = SPOILS.get(self._fault)
            return timeline.model_copy(update={"requests": tuple(map(spoil, timeline.requests))}) if spoil else timeline

        def tokens_seen(self) -> int:
            return self._tokens

    return Faulty()
