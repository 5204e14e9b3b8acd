"""What disturbs a timed call, read outside of it, and when that is ground enough to reject it.

Never for being slow: a sample is rejected only for a cause that something else than its own time tells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import psutil

from kvat_core.probes import gpu, host
from kvat_core.schema import Conditions, GpuConditions

MIN_WINDOW_S = 0.05
"""The kernel counts in steps of some milliseconds, so shorter calls are not judged."""
MIN_TICKS = 50
"""Of all CPUs together; of fewer, a single one of 10 ms would already be a share."""
MAX_STEAL = 0.05
MAX_WAITING = 0.05
MAX_PRESSURE = 0.05
"""Shares above which other work has a part in the time of a call."""
MAX_MAJOR_FAULTS = 10
MIN_CLOCK = 0.75
"""Share of the fastest clock seen in this run, below which a card was held back (nvbench's threshold)."""
HELD_BACK = ("hardware slowdown", "thermal slowdown", "hardware thermal slowdown", "power brake")
"""A power cap is missing here: it belongs to the card, and to every user's call."""

End = Callable[[], Conditions]
Watch = Callable[[int | None], End]
"""Called with the worker's process id right before a timed call; what it returns is called right after it."""


class SystemWatch:
    """The `Watch` of this machine.

    Args:
        device_uuid: NVIDIA's name of the card that is measured on, None without one.
    """

    def __init__(self, device_uuid: str | None) -> None:
        self._card = gpu.open_card(device_uuid)

    def __call__(self, pid: int | None) -> End:
        """See `Watch`."""
        card = self._card
        energy_mj = card.energy_mj() if card else None
        before = host.read_counters(pid)

        def end() -> Conditions:
            after = host.read_counters(pid)
            return _conditions(before, after, None if card is None else _gpu(card, pid, energy_mj))

        return end

    def process_bytes(self, pid: int | None) -> int | None:
        """Memory of the worker and its children on the card by the driver, None where it does not tell."""
        if self._card is None:
            return None
        held = [self._card.process_bytes(own) for own in _family(pid)]
        known = [one for one in held if one is not None]
        return sum(known) if known else None


def causes(conditions: Conditions, fastest_clock_mhz: int | None) -> tuple[str, ...]:
    """Why a call under these conditions is not to be trusted, in words; none = it is.

    Args:
        conditions: of the call.
        fastest_clock_mhz: of the card so far in this run, None where nobody knows.
    """
    if conditions.window_s < MIN_WINDOW_S:
        return ()
    shares = (
        ("its host took CPU time away ({} of the machine's)", conditions.steal_share, MAX_STEAL),
        ("the worker waited for a free core ({} of its time)", conditions.waiting_share, MAX_WAITING),
        ("memory was short ({} of the time)", conditions.memory_pressure, MAX_PRESSURE),
    )
    found = [text.format(f"{share:.0%}") for text, share, limit in shares if share is not None and share > limit]
    if (conditions.major_faults or 0) > MAX_MAJOR_FAULTS:
        found.append(f"pages of the worker came from a disk ({conditions.major_faults})")
    return (*found, *_gpu_causes(conditions.gpu, fastest_clock_mhz))


def _gpu_causes(card: GpuConditions | None, fastest_clock_mhz: int | None) -> tuple[str, ...]:
    if card is None:
        return ()
    found = [f"the card reports {reason}" for reason in card.throttle_reasons if reason in HELD_BACK]
    if card.foreign_processes:
        found.append(f"other processes held a context on the card ({card.foreign_processes})")
    if card.clock_mhz is not None and fastest_clock_mhz and card.clock_mhz < MIN_CLOCK * fastest_clock_mhz:
        found.append(f"the card ran slower than before ({card.clock_mhz} of {fastest_clock_mhz} MHz)")
    return tuple(found)


def _gpu(card: gpu.Card, pid: int | None, energy_mj: int | None) -> GpuConditions:
    energy_after_mj = card.energy_mj()
    pids, own = card.pids(), _family(pid)
    return GpuConditions(
        clock_mhz=card.clock_mhz(),
        temperature_c=card.temperature_c(),
        throttle_reasons=card.throttle_reasons(),
        # In a container the driver may know the worker by another id: then it is the one that is not foreign.
        foreign_processes=len(pids - own) if pids & own else max(0, len(pids) - 1),
        energy_j=None if energy_mj is None or energy_after_mj is None else (energy_after_mj - energy_mj) / 1000,
    )


def _conditions(before: host.Counters, after: host.Counters, card: GpuConditions | None) -> Conditions:
    window_s = after.time_s - before.time_s
    window_us = max(1e-9, window_s) * 1e6
    stalled = {
        resource: min(1.0, (us - before.stalled_us[resource]) / window_us)
        for resource, us in after.stalled_us.items()
        if resource in before.stalled_us
    }
    running_ns, waiting_ns = _rise(before.running_ns, after.running_ns), _rise(before.waiting_ns, after.waiting_ns)
    runnable_ns = None if running_ns is None or waiting_ns is None else running_ns + waiting_ns
    stolen, ticks = _rise(before.stolen_ticks, after.stolen_ticks), _rise(before.cpu_ticks, after.cpu_ticks)
    return Conditions(
        window_s=window_s,
        load_average=host.load_average(),
        steal_share=_share(stolen, ticks) if ticks is not None and ticks >= MIN_TICKS else None,
        waiting_share=_share(waiting_ns, runnable_ns),
        cpu_pressure=stalled.get("cpu"),
        memory_pressure=stalled.get("memory"),
        io_pressure=stalled.get("io"),
        major_faults=_rise(before.major_faults, after.major_faults),
        gpu=card,
    )


def _family(pid: int | None) -> frozenset[int]:
    """A process and all that it has started."""
    if pid is None:
        return frozenset()
    with contextlib.suppress(psutil.Error):
        return frozenset({pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))})
    return frozenset({pid})


def _rise(before: int | None, after: int | None) -> int | None:
    """How much a counter has grown; a thread that ended has taken its part along, so never less than 0."""
    return None if before is None or after is None else max(0, after - before)


def _share(part: int | None, whole: int | None) -> float | None:
    return None if part is None or not whole else part / whole
