"""A digest of what a user wrote tells nobody else what that was."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest

from kvat_core.private import keyed_digest

TEXT = "my own words"


def key_file(home: Path) -> Path:
    """The one file in a config home."""
    (file,) = (path for path in home.rglob("*") if path.is_file())
    return file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this user's configuration is."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.mark.usefixtures("home")
def test_equal_texts_have_equal_digests_and_others_have_not() -> None:
    assert keyed_digest(TEXT) == keyed_digest(TEXT)
    assert keyed_digest(TEXT) != keyed_digest(TEXT + " ")


@pytest.mark.usefixtures("home")
def test_a_digest_is_not_that_of_the_text_alone() -> None:
    digest = keyed_digest(TEXT)
    assert digest is not None
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert digest != hashlib.sha256(TEXT.encode()).hexdigest()


def test_the_key_is_in_the_config_home_for_its_owner_alone(home: Path) -> None:
    before = os.umask(0)
    try:
        keyed_digest(TEXT)
    finally:
        os.umask(before)
    key = key_file(home)
    assert key.is_relative_to(home / "kvat")
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700


def test_another_config_home_has_another_key(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = keyed_digest(TEXT)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another"))
    assert keyed_digest(TEXT) != digest
    assert key_file(home).read_bytes() != key_file(tmp_path / "another").read_bytes()


@pytest.mark.parametrize("named", [None, "", "relative/config"])
def test_without_a_usable_name_the_config_home_is_in_the_users_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if named is None:
        monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CONFIG_HOME", named)
    assert keyed_digest(TEXT) is not None
    assert key_file(tmp_path).is_relative_to(tmp_path / "home" / ".config")


def test_where_no_key_can_be_kept_there_is_no_digest(home: Path) -> None:
    home.write_text("a file, not a directory")
    assert keyed_digest(TEXT) is None


def test_a_user_without_a_home_has_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert keyed_digest(TEXT) is None


def test_a_file_that_is_no_key_is_left_as_it_is(home: Path) -> None:
    keyed_digest(TEXT)
    key = key_file(home)
    key.write_bytes(b"short")
    assert keyed_digest(TEXT) is None
    assert key.read_bytes() == b"short"


def test_what_could_not_be_put_in_place_leaves_no_rest(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    assert keyed_digest(TEXT) is None
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_who_comes_second_takes_the_key_of_the_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def overtaken(source: Path, target: Path) -> None:
        target.write_bytes(b"k" * 32)
        link(source, target)

    monkeypatch.setattr(os, "link", overtaken)
    digest = keyed_digest(TEXT)
    assert digest is not None
    assert key_file(home).read_bytes() == b"k" * 32
    assert keyed_digest(TEXT) == digest
