"""When the tokens of a call come about: on the host's clock, or on the device's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from transformers import StoppingCriteria, StoppingCriteriaList


class TokenClock(Protocol):
    """Times one call of `generate`."""

    kind: Literal["host", "device"]
    """Whose clock it is."""

    def arguments(self) -> dict[str, Any]:
        """What `generate` needs to be given for the clock to see its tokens."""

    def start(self) -> None:
        """Right before the call."""

    def token_s(self) -> list[float]:
        """After the call: seconds from its start to each token."""

    def seen(self) -> int:
        """Tokens so far; asked from another thread while the call runs."""


class HostClock:
    """A streamer that notes when tokens reach the host; the first thing it gets is the prompt."""

    kind: Literal["host", "device"] = "host"

    def __init__(self) -> None:
        self._times_ns: list[int] = []
        self._start_ns = 0

    def arguments(self) -> dict[str, Any]:
        """See `TokenClock.arguments`."""
        return {"streamer": self}

    def start(self) -> None:
        """See `TokenClock.start`."""
        self._start_ns = time.perf_counter_ns()

    def token_s(self) -> list[float]:
        """See `TokenClock.token_s`."""
        return [(time_ns - self._start_ns) / 1e9 for time_ns in self._times_ns[1:]]

    def seen(self) -> int:
        """See `TokenClock.seen`."""
        return max(0, len(self._times_ns) - 1)

    def put(self, tokens: torch.Tensor) -> None:
        """Called by `generate` with each batch of tokens."""
        self._times_ns.append(time.perf_counter_ns())

    def end(self) -> None:
        """Called by `generate` after the last one."""


class DeviceClock(StoppingCriteria):
    """A criterion that never stops anything and has the device note when it has come to the end of each step.

    Nobody waits for the device while it works: an event is one more entry in its queue. A streamer would have each
    token copied to the host, and on mps gets it a step late.

    Args:
        event: makes an event that keeps its time, e.g. `torch.cuda.Event(enable_timing=True)`.
    """

    kind: Literal["host", "device"] = "device"

    def __init__(self, event: Callable[[], Any]) -> None:
        self._event = event
        self._start = event()
        self._tokens: list[Any] = []
        self._never: torch.Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """See `TokenClock.arguments`."""
        return {"stopping_criteria": StoppingCriteriaList([self])}

    def start(self) -> None:
        """See `TokenClock.start`; the queue is empty then, so that the event is done at once."""
        self._start.record()

    def token_s(self) -> list[float]:
        """See `TokenClock.token_s`."""
        self._tokens[-1].synchronize()
        return [self._start.elapsed_time(token) / 1e3 for token in self._tokens]

    def seen(self) -> int:
        """See `TokenClock.seen`: of steps in the queue, which may not be done yet."""
        return len(self._tokens)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Called by `generate` after each step, when the new token is in `input_ids`."""
        token = self._event()
        token.record()
        self._tokens.append(token)
        if self._never is None:
            self._never = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return self._never


def clock_for(device: torch.device) -> TokenClock:
    """A new clock for one call on that device."""
    if device.type == "cuda":
        return DeviceClock(lambda: torch.cuda.Event(enable_timing=True))
    if device.type == "mps":
        return DeviceClock(lambda: torch.mps.Event(enable_timing=True))
    return HostClock()


def synchronize(device: torch.device) -> None:
    """Wait until that device has done all that is in its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
