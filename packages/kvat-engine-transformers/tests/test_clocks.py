"""Both clocks see every token of a call, and none of them changes it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

from kvat_core import metrics
from kvat_core.schema import PromptSource, Recipe, Scenario
from kvat_engine_transformers import TransformersAdapter
from kvat_engine_transformers.calling.clocks import DeviceClock, HostClock, clock_for
from kvat_engine_transformers.measuring import adapter

Prepared = Callable[..., tuple[TransformersAdapter, Recipe]]
TEXT = PromptSource(kind="text", value="the quick brown fox jumps over the lazy dog")
SCENARIO = Scenario(prompt_tokens=48, output_tokens=6, batch_size=2)


class Queue:
    """A device that notes the time, in milliseconds, whenever its queue is said to reach an event."""

    def __init__(self) -> None:
        self._clock_ms = count(100.0, 10.0)
        self.waits = 0

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def record(self) -> None:
        self.time_ms = next(self._queue._clock_ms)

    def synchronize(self) -> None:
        self._queue.waits += 1

    def elapsed_time(self, other: Event) -> float:
        return other.time_ms - self.time_ms


def run(prepared: Prepared, cache: str) -> tuple[TransformersAdapter, torch.Tensor]:
    made, _ = prepared("builtin:llama", SCENARIO, cache=cache)
    return made, made.make_prompt(TEXT, SCENARIO.prompt_lengths, 1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_device_s_own_events_give_one_time_per_token(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    queue = Queue()
    monkeypatch.setattr(adapter, "clock_for", lambda device: DeviceClock(queue.event))
    made, prompt = run(prepared, cache)
    timeline = made.run_decode(prompt, SCENARIO.output_tokens)
    (both,) = timeline.requests
    assert both.count == SCENARIO.batch_size == 2
    assert both.ttft_s == pytest.approx(0.01)
    assert both.token_gaps_s == pytest.approx((0.01,) * 5)
    assert both.output_tokens == SCENARIO.output_tokens
    assert made.tokens_seen() == SCENARIO.output_tokens
    assert queue.waits == 1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_clock_changes_no_token(prepared: Prepared, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    made, prompt = run(prepared, cache)
    by_host = made.generate(prompt, SCENARIO.output_tokens).tokens
    monkeypatch.setattr(adapter, "clock_for", lambda device: DeviceClock(Queue().event))
    assert torch.equal(made.generate(prompt, SCENARIO.output_tokens).tokens, by_host)


def test_the_host_s_clock_sees_every_token_of_the_call_that_runs(prepared: Prepared) -> None:
    made, prompt = run(prepared, "dynamic")
    for tokens in (6, 3):
        timeline = made.run_decode(prompt, tokens)
        assert made.tokens_seen() == tokens
        assert metrics.invalid_reason(timeline, SCENARIO.model_copy(update={"output_tokens": tokens})) is None


def test_each_device_has_the_clock_that_disturbs_it_least(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def event(**options: Any) -> Event:
        made.append(options)
        return Queue().event()

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.mps, "Event", event, raising=False)
    assert isinstance(clock_for(torch.device("cpu")), HostClock)
    for kind in ("cuda", "mps"):
        assert isinstance(clock_for(torch.device(kind)), DeviceClock)
    assert made == [{"enable_timing": True}] * 2
