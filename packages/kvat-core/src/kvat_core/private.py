"""Digests of what a user wrote: equal for equal texts on this machine, and of no use to anybody else."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from functools import cache
from pathlib import Path

from kvat_core import user_folders

KEY_BYTES = 32


def keyed_digest(text: str, *, or_for_now: bool = False) -> str | None:
    """HMAC-SHA256 of a text with the key of this installation; None where no key can be kept.

    A bare hash would not do: short or known texts can be found by trying.

    Args:
        text: what is to be known again.
        or_for_now: take a key that lasts as long as this process where no other can be kept, rather than none.
    """
    key = _key() or (_key_for_now() if or_for_now else None)
    return None if key is None else _digest(key, text)


def digest_if_known(text: str) -> str | None:
    """The same with the key that is there; None where there is none, as none is made."""
    key = _key(make=False)
    return None if key is None else _digest(key, text)


def _digest(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


@cache
def _key_for_now() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def _key(*, make: bool = True) -> bytes | None:
    try:
        path = user_folders.config_home() / "kvat" / "key"
        if make and not path.exists():
            _create(path)
        key = path.read_bytes()
    except (OSError, RuntimeError):  # the latter: a user without a home
        return None
    return key if len(key) == KEY_BYTES else None


def _create(path: Path) -> None:
    """Put a key in place whole, readable for its owner alone; who comes second keeps the first one's."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f".{secrets.token_hex(8)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(KEY_BYTES))
        os.fsync(descriptor)
        os.link(fresh, path)
    except FileExistsError:
        pass
    finally:
        os.close(descriptor)
        fresh.unlink()
