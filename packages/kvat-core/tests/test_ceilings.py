"""Ceilings are measured once per circumstances, and a cache that fails costs no run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvat_core import ceilings
from kvat_core.schema import Ceiling, Ceilings, Machine

RATE = Ceiling(best=2.0, median=1.0)
FOUND = Ceilings(read_bytes_per_s=RATE, copy_bytes_per_s=RATE, gemm_flop_per_s={"float32": RATE}, launch_floor_s=RATE)
MACHINE = Machine(fingerprint="f", device="cpu", cpu="c", cores=2, memory_bytes=1000, os="o", python="3")


class Measuring:
    """Counts how often it is asked."""

    def __init__(self, found: Ceilings | None = FOUND) -> None:
        self.found = found
        self.times = 0

    def __call__(self, dtypes: Sequence[str]) -> Ceilings | None:
        self.times += 1
        return self.found and self.found.model_copy(update={"gemm_flop_per_s": dict.fromkeys(dtypes, RATE)})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvat"


def ask(measure: Measuring, machine: Machine = MACHINE, torch: str = "1", dtypes: tuple[str, ...] = ("a", "b")) -> None:
    found = ceilings.kept(machine, "engine", {"torch": torch}, dtypes, measure)
    assert found is None if measure.found is None else found and found.gemm_flop_per_s.keys() >= set(dtypes)


def test_what_was_measured_is_kept() -> None:
    measure = Measuring()

    ask(measure)
    ask(measure, dtypes=("b", "a"))

    assert measure.times == 1


def test_other_circumstances_are_measured_anew() -> None:
    measure = Measuring()

    ask(measure)
    ask(measure, torch="2")
    ask(measure, MACHINE.model_copy(update={"fingerprint": "other threads"}))

    assert measure.times == 3


def test_a_new_dtype_is_measured_with_those_of_before() -> None:
    measure = Measuring()

    ask(measure)
    ask(measure, dtypes=("a",))
    ask(measure, dtypes=("c",))
    ask(measure, dtypes=("a", "c"))
    ask(measure)

    assert measure.times == 2


@pytest.mark.parametrize("damaged", [b"", b"{}", b"\xff", b'{"threads": 1'])
def test_a_damaged_file_is_measured_again_and_mended(cache: Path, damaged: bytes) -> None:
    measure = Measuring()
    ask(measure)
    (file,) = cache.iterdir()
    file.write_bytes(damaged)

    ask(measure)
    ask(measure)

    assert measure.times == 2


def test_a_cache_that_cannot_be_written_costs_no_run(cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    measure = Measuring()

    ask(measure)
    ask(measure)

    assert measure.times == 2


def test_what_is_known_serves_where_more_cannot_be_measured() -> None:
    known = ceilings.kept(MACHINE, "engine", {}, ("a",), Measuring())

    assert ceilings.kept(MACHINE, "engine", {}, ("a", "b"), Measuring(None)) == known


def test_what_an_engine_cannot_measure_is_not_kept(cache: Path) -> None:
    ask(Measuring(None))

    assert not cache.exists()
