"""Values of the options that limit what may be recommended; the options themselves are in `commands._limits`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal

from kvat_core import Limit, Limits
from kvat_core.errors import UsageError
from kvat_core.schema import MOST_PERCENTILE

_BYTES = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1)}
_RATE = {"": Decimal(1)}
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"


def limits(
    *,
    max_vram: str | None,
    max_ram: str | None,
    max_ttft: str | None,
    max_tpot: str | None,
    min_decode_tps: str | None,
    min_context: int | None,
    max_kl: float | None,
    allow_lossy: bool | None,
) -> Limits:
    """The limits that were given; the others are left to the profile.

    Raises:
        UsageError: a value without its unit, or one that is no limit; it shows the form.
    """
    return Limits(
        max_device_bytes=_bytes("--max-vram", max_vram),
        max_host_bytes=_bytes("--max-ram", max_ram),
        max_ttft_s=_limit("--max-ttft", max_ttft, _SECONDS, "a time in ms or s, e.g. 300ms, 0.3s or p95:300ms"),
        max_tpot_s=_limit("--max-tpot", max_tpot, _SECONDS, "a time in ms or s, e.g. 50ms, 0.05s or p95:50ms"),
        min_decode_tps=_limit("--min-decode-tps", min_decode_tps, _RATE, "tokens per second, e.g. 20 or p95:20"),
        min_context_tokens=min_context,
        max_kl_nats=None if max_kl is None else _kl_nats(max_kl),
        allow_lossy=allow_lossy,
    )


def _kl_nats(value: float) -> float:
    if not 0 < value < math.inf:
        raise UsageError(f"--max-kl takes a divergence in nats above 0, e.g. 0.05; got {value:g}")
    return value


def _bytes(option: str, text: str | None) -> int | None:
    return (
        None
        if text is None
        else math.ceil(_number(option, text, _BYTES, "a size in MiB, GiB, TiB, MB, GB or TB, e.g. 6GiB"))
    )


def _limit(option: str, text: str | None, units: Mapping[str, Decimal | int], form: str) -> Limit | None:
    if text is None:
        return None
    share, colon, value = text.rpartition(":")
    if not colon:
        return Limit(value=_number(option, value, units, form))
    return Limit(value=_number(option, value, units, form), percentile=_percentile(option, share))


def _percentile(option: str, text: str) -> float:
    found = re.fullmatch(f"p({_NUMBER})", text)
    if found is None or not 0 < float(found[1]) <= MOST_PERCENTILE:
        raise UsageError(f"{option} takes a percentile above p0, up to p{MOST_PERCENTILE}, e.g. p95; got {text!r}")
    return float(found[1])


def _number(option: str, text: str, units: Mapping[str, Decimal | int], form: str) -> float:
    found = re.fullmatch(f"({_NUMBER})({'|'.join(units)})", text)
    value = float(Decimal(found[1]) * units[found[2]]) if found else math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"{option} takes {form}; got {text!r}")
    return value
