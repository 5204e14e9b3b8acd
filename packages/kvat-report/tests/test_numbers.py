from __future__ import annotations

import pytest

from kvat_core.schema import Estimate, Ratio
from kvat_report import numbers


def estimate(median: float, low: float | None = None, high: float | None = None) -> Estimate:
    return Estimate(median=median, low=median if low is None else low, high=median if high is None else high, n=3)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (estimate(0.0123, 0.0121, 0.0126), "12.3 ms [12.1, 12.6]"),
        (estimate(0.0123, 0.008, 0.020), "12 ms [8, 20]"),
        (estimate(0.0123, 0.012299, 0.012301), "12.30 ms [12.30, 12.30]"),
        (estimate(0.0123, 0.0123 * (1 - 1e-15), 0.0123 * (1 + 1e-15)), "12.3 ms"),
        (estimate(1.7203, 1.70, 1.74), "1.72 s [1.70, 1.74]"),
        (estimate(0.99996), "1.00 s"),
        (estimate(0.9996e-3), "1.00 ms"),
        (estimate(0.0005), "500 µs"),
        (estimate(2.5e-9), "2.50 ns"),
        (estimate(123.4), "123 s"),
        (estimate(float("inf")), "inf s"),
    ],
)
def test_time(value: Estimate, shown: str) -> None:
    assert numbers.time(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (estimate(41.23, 40.9, 41.5), "41.2 tok/s [40.9, 41.5]"),
        (estimate(12345.6, 12000, 13000), "12346 tok/s [12000, 13000]"),
        (estimate(0.0), "0 tok/s"),
    ],
)
def test_rate(value: Estimate, shown: str) -> None:
    assert numbers.rate(value) == shown


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (1.4123, 1.3711, 1.4537, "1.41× [1.37, 1.45]"),
        (1.4123, None, None, "1.41×"),
        (1.0, 1.0, 1.0, "1.00×"),
        (1.0042, 1.0021, 1.0063, "1.004× [1.002, 1.006]"),
        (2.5, 1.2, 4.9, "2.50× [1.20, 4.90]"),
        (0.98, 0.7, 1.3, "0.98× [0.70, 1.30]"),
        (12.4, 11.0, 13.9, "12.40× [11.00, 13.90]"),
    ],
)
def test_ratio(value: float, low: float | None, high: float | None, shown: str) -> None:
    assert numbers.ratio(Ratio(value=value, low=low, high=high, n=3)) == shown


def test_no_ratio_is_a_dash() -> None:
    assert numbers.ratio(None) == numbers.NOTHING


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, numbers.NOTHING),
        (0, "0 B"),
        (512, "512 B"),
        (1024, "1.00 KiB"),
        (96 << 20, "96.0 MiB"),
        ((1 << 30) - 1, "1.00 GiB"),
        (1_514_000_000, "1.41 GiB"),
        (140 << 30, "140 GiB"),
        (3 << 40, "3.00 TiB"),
    ],
)
def test_size(count: int | None, shown: str) -> None:
    assert numbers.size(count) == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, "0 %"), (0.012, "1.2 %"), (0.0996, "10 %"), (0.97, "97 %"), (1.0, "100 %"), (0.99, "99 %")],
)
def test_percent(share: float, shown: str) -> None:
    assert numbers.percent(share) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (4.21, "4.2 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (72, "1 min 12 s"),
        (3599.6, "1 h 00 min"),
        (7380, "2 h 03 min"),
    ],
)
def test_duration(seconds: float, shown: str) -> None:
    assert numbers.duration(seconds) == shown


def test_without_an_interval() -> None:
    assert numbers.seconds(0.01234) == "12.3 ms"
    assert numbers.tokens_per_second(41.234) == "41.2 tok/s"


@pytest.mark.parametrize(
    ("share", "shown"),
    [(None, numbers.NOTHING), (1.0, "100.0 %"), (0.99, "99.0 %"), (0.98999, "98.9 %"), (0.29, "29.0 %")],
)
def test_an_agreement_is_never_shown_as_a_limit_that_it_misses(share: float | None, shown: str) -> None:
    assert numbers.agreement(share) == shown


@pytest.mark.parametrize(("value", "shown"), [(2.0, "2"), (0.5, "0.5"), (1.0837, "1.08")])
def test_plain(value: float, shown: str) -> None:
    assert numbers.plain(value) == shown
