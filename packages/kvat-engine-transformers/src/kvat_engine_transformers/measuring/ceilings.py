"""What this machine can do at most, by torch: read, copy, multiply, move to a device, start an operation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kvat_core.schema import Ceiling, Ceilings, ModelRef, PromptSource, Scenario, Target
from kvat_engine_transformers.calling.clocks import synchronize
from kvat_engine_transformers.measuring import memory
from kvat_engine_transformers.measuring.adapter import TransformersAdapter
from kvat_engine_transformers.settings.knobs import PLAIN
from kvat_engine_transformers.settings.recipes import recipe

_WARM_UPS, _REPEATS = 3, 10
_LONGEST_S = 2.0
"""No rate takes longer: a dtype that this processor can only emulate has fewer repeats."""
_LEAST_BYTES = 256 * 2**20
_TIMES_CACHE = 4
_GEMM = {"cpu": 1024, "cuda": 8192, "mps": 4096}
"""Rows of the square matrices: as many as the units are busy with and a repeat takes well under a second."""
_LAUNCHES = 200
_COLUMNS = 4096
_FIRST_CALL_TOKENS = 16


def measure_ceilings(device: str, threads: int | None, dtypes: Sequence[str]) -> Ceilings:
    """Best and median of ten repeats after three warm-ups, as STREAM takes the best; a first call's memory before all.

    Args:
        device: as `probe_device` names it.
        threads: CPU threads, None for torch's own number.
        dtypes: those that matrices are multiplied in; the first call is made in the first.
    """
    # Before anything else of torch has run: later, its code would be in memory already.
    first_call = _first_call_bytes(threads, dtypes[0]) if device == "cpu" else None
    if threads is not None:
        torch.set_num_threads(threads)
    place = torch.device(device)
    cache_bytes = _cache_bytes(place)
    buffer = _Buffers(place, max(_LEAST_BYTES, _TIMES_CACHE * (cache_bytes or 0)))
    return Ceilings(
        threads=threads,
        read_bytes_per_s=buffer.read(),
        copy_bytes_per_s=buffer.copy(),
        gemm_flop_per_s={dtype: _gemm(place, getattr(torch, dtype)) for dtype in dtypes},
        to_device_bytes_per_s=buffer.to_device() if place.type == "cuda" else None,
        from_device_bytes_per_s=buffer.from_device() if place.type == "cuda" else None,
        launch_floor_s=_launch_floor(place),
        cache_bytes=cache_bytes,
        first_call_bytes=first_call,
    )


def _first_call_bytes(threads: int | None, dtype: str) -> int:
    """Rise of the resident size by the calls of a model that itself needs next to nothing."""
    scenario = Scenario(prompt_tokens=_FIRST_CALL_TOKENS, output_tokens=2)
    settings = {**PLAIN, "dtype": dtype}
    target = Target(model=ModelRef(id="builtin:llama"), device="cpu", threads=threads)
    first = recipe({**settings, "threads": "own" if threads is None else str(threads)}, scenario, target)
    adapter = TransformersAdapter()
    load: dict[str, Any] = first.load
    adapter.load_model(**load)
    adapter.prepare_cache(first)
    before = memory.resident_bytes()
    prompt = adapter.make_prompt(PromptSource(kind="text", value="first call"), [_FIRST_CALL_TOKENS], 0)
    adapter.run_decode(prompt, scenario.output_tokens)
    return max(0, memory.resident_bytes() - before)


class _Buffers:
    """Two buffers far larger than any cache; filled, and so placed in memory, by the threads that read them."""

    def __init__(self, device: torch.device, least_bytes: int) -> None:
        self._device = device
        rows = -(-least_bytes // (4 * _COLUMNS))
        self._numbers = torch.ones(rows * _COLUMNS, device=device)
        self._size_bytes = self._numbers.nbytes
        self._others = torch.zeros_like(self._numbers)

    def read(self) -> Ceiling:
        """The better of a sum, and of the product with a vector, by which decoding reads the weights."""
        matrix = self._numbers.view(-1, _COLUMNS)
        vector = torch.ones(_COLUMNS, device=self._device)
        by_sum = _rate(self._numbers.sum, self._size_bytes, self._device)
        by_product = _rate(lambda: torch.mv(matrix, vector), self._size_bytes, self._device)
        return max(by_sum, by_product, key=lambda ceiling: ceiling.best)

    def copy(self) -> Ceiling:
        return _rate(lambda: self._others.copy_(self._numbers), 2 * self._size_bytes, self._device)

    def to_device(self) -> Ceiling:
        locked = torch.ones(self._numbers.numel(), pin_memory=True)
        return _rate(lambda: self._numbers.copy_(locked, non_blocking=True), self._size_bytes, self._device)

    def from_device(self) -> Ceiling:
        locked = torch.ones(self._numbers.numel(), pin_memory=True)
        return _rate(lambda: locked.copy_(self._numbers, non_blocking=True), self._size_bytes, self._device)


def _gemm(device: torch.device, dtype: torch.dtype) -> Ceiling:
    rows = _GEMM[device.type]
    matrix = torch.ones(rows, rows, dtype=dtype, device=device)
    return _rate(lambda: torch.mm(matrix, matrix), 2 * rows**3, device)


def _launch_floor(device: torch.device) -> Ceiling:
    """Seconds per operation: of an addition to one number, many times in a row."""
    number = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(_LAUNCHES):
            number.add_(1.0)

    times_s = [time_s / _LAUNCHES for time_s in _times_s(many, device)]
    return Ceiling(best=min(times_s), median=median(times_s))


def _rate(operation: Callable[[], object], amount: int, device: torch.device) -> Ceiling:
    times_s = _times_s(operation, device)
    return Ceiling(best=amount / min(times_s), median=amount / median(times_s))


@torch.no_grad()
def _times_s(operation: Callable[[], object], device: torch.device) -> list[float]:
    begun_s = time.perf_counter()
    for _ in range(_WARM_UPS):
        operation()
    times_s: list[float] = []
    while len(times_s) < _REPEATS and not (times_s and time.perf_counter() - begun_s > _LONGEST_S):
        synchronize(device)
        start_ns = time.perf_counter_ns()
        operation()
        synchronize(device)
        times_s.append((time.perf_counter_ns() - start_ns) / 1e9)
    return times_s


def _cache_bytes(device: torch.device) -> int | None:
    """Last-level cache, where the system or the driver tells."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _cpu_cache_bytes() if device.type == "cpu" else None


def _cpu_cache_bytes() -> int | None:
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    numbers = [int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")]
    return max(numbers, default=None)
