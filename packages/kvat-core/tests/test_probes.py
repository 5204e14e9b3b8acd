"""What the system tells of this machine, and what it keeps to itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pynvml
import pytest

from kvat_core import machine
from kvat_core.probes import cpu, gpu


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An NVML with one card that tells everything."""
    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": "580.1",
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": object(),
        "nvmlDeviceGetName": "Some Card",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=8 << 30),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
    return monkeypatch


def refuse(*_: object) -> NoReturn:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_a_card_is_described(driver: pytest.MonkeyPatch) -> None:
    (card,) = gpu.gpus()
    assert (card.name, card.memory_bytes, card.driver) == ("Some Card", 8 << 30, "580.1")


@pytest.mark.parametrize("silent", ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetName", "nvmlSystemGetDriverVersion"])
def test_what_a_card_does_not_tell_is_null_and_no_error(driver: pytest.MonkeyPatch, silent: str) -> None:
    driver.setattr(pynvml, silent, refuse)
    (card,) = gpu.gpus()
    told = (card.name, card.memory_bytes, card.driver)
    assert sum(value in (None, "unknown") for value in told) == 1


def test_without_a_driver_there_are_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert gpu.gpus() == ()


def test_hidden_power_supplies_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden() -> NoReturn:
        raise FileNotFoundError("/sys/class/power_supply")

    monkeypatch.setattr(psutil, "sensors_battery", hidden, raising=False)
    assert not any("battery" in finding for finding in machine.warnings())


def test_available_memory_is_part_of_all_memory() -> None:
    assert 0 < cpu.available_memory_bytes() <= cpu.memory_bytes()
