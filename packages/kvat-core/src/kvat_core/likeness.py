"""From the log-probabilities of two ways to compute to how alike they are. Pure; runs in the worker.

All arrays are float32 or wider: requests × steps × vocabulary for log-probabilities, requests × steps for tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvat_core.schema import Likeness, Rounding

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]

CLEAR = 4.0
"""A first choice is clear if it is preferred by more than so many times the rounding."""
_LEAST = float(np.log(np.finfo(np.float32).tiny))
"""What a less probable token counts as, so that the divergence of an impossible one is finite: log of the least normal
float32."""


@dataclass(frozen=True)
class Reference:
    """What the reference predicts, and what it chooses by itself."""

    text: Floats
    greedy: Floats
    chosen: Tokens
    rounding: Rounding | None

    def save(self, folder: Path) -> None:
        """Write it where `load` finds it; the folder must be there."""
        for name, array in (("text", self.text), ("greedy", self.greedy), ("chosen", self.chosen)):
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        if self.rounding is not None:
            (folder / "rounding.json").write_text(self.rounding.model_dump_json(), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """What was saved there, without reading more into memory than is looked at."""
        text, greedy, chosen = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("text", "greedy", "chosen")
        )
        told = folder / "rounding.json"
        rounding = Rounding.model_validate_json(told.read_text(encoding="utf-8")) if told.is_file() else None
        return cls(text, greedy, chosen, rounding)


def are_numbers(logprobs: Floats) -> bool:
    """Whether each step predicts something: an impossible token is minus infinity, but nothing is undefined."""
    return not np.isnan(logprobs).any() and bool((logprobs.max(axis=-1) > -np.inf).all())


def rounding(stepwise: Floats, at_once: Floats) -> Rounding:
    """How far two computations of the same differ that no cache tells apart."""
    largest, divergences = 0.0, []
    for one, other in zip(_steps(stepwise), _steps(at_once), strict=True):
        first, second = _first_two(one)
        largest = max(largest, abs(one[first] - other[first]), abs(one[second] - other[second]))
        divergences.append(_kl(one, other))
    return Rounding(choice_nats=float(largest), kl_nats=float(np.mean(divergences)))


def compare(reference: Floats, candidate: Floats, noise: Rounding | None) -> Likeness:
    """How alike two computations are that were given the same tokens.

    Args:
        reference: log-probabilities of the one.
        candidate: of the other.
        noise: of the reference; None = unknown, so any difference of a first choice is a clear one.

    Raises:
        ValueError: they differ in shape, or the candidate's are no numbers.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"log-probabilities of shape {candidate.shape} beside {reference.shape}")
    if not are_numbers(candidate):
        raise ValueError("log-probabilities that are no numbers")
    threshold = CLEAR * (0.0 if noise is None else noise.choice_nats)
    steps = reference.shape[1]
    divergences: list[float] = []
    parted: list[int] = []
    clearly: list[int] = []
    for place, (one, other) in enumerate(zip(_steps(reference), _steps(candidate), strict=True)):
        divergences.append(_kl(one, other))
        first, second = _first_two(one)
        if int(np.argmax(other)) != first:
            parted.append(place % steps)
            if one[first] - one[second] > threshold:
                clearly.append(place % steps)
    return Likeness(
        steps=len(divergences),
        kl_nats=float(np.mean(divergences)),
        kl_max_nats=max(divergences),
        top1_agreement=1 - len(parted) / len(divergences),
        first_divergence=min(parted, default=None),
        first_clear_divergence=min(clearly, default=None),
    )


def _steps(logprobs: Floats) -> Iterator[Floats]:
    """Step by step, as what is kept in a file need not fit into memory."""
    for step in logprobs.reshape(-1, logprobs.shape[-1]):
        yield np.maximum(step, _LEAST)


def _first_two(logprobs: Floats) -> tuple[int, int]:
    """The first choice as a greedy decoder finds it, the first of equals, and the best of the others."""
    first = int(np.argmax(logprobs))
    others = np.array(logprobs)
    others[first] = -np.inf
    return first, int(np.argmax(others))


def _kl(reference: Floats, candidate: Floats) -> float:
    """KL(reference ‖ candidate) in nats; rounding may make a tiny one negative."""
    log_p = np.asarray(reference, np.float64)
    log_q = np.asarray(candidate, np.float64)
    return max(0.0, float(np.sum(np.exp(log_p) * (log_p - log_q))))
