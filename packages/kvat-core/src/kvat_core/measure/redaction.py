"""What foreign libraries say, without what is nobody else's business."""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePath

from pydantic import JsonValue

from kvat_core import private
from kvat_core.schema import PromptSource

WITHHELD = "(withheld: it repeats the prompt)"
COMMON = 20
"""Characters in a row that a text has in common with a prompt only if it repeats it."""

_CODE_POINT = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))")
_WHITE = re.compile(r"\\[nrt]")
_QUOTED = re.compile(r"(?<=['\"])(?:…|[A-Za-z]:)?[/\\][^'\"\n]*[/\\]")
_WORD = r"[^\s'\"/\\:…]+"
_SPACED_NAME = rf"(?:[^\s'\"/\\:….,;)]+ (?!-\S)){{0,7}}{_WORD}"
"""A directory's name may well hold spaces, but is no sentence, and no end of a file's name or of a list is in it."""
_ABOVE = re.compile(rf"(?:[/\\]{_SPACED_NAME})+(?=…[/\\])")
_SPACED = re.compile(rf"(?<![\w.])(?:…|[A-Za-z]:)?[/\\](?:{_SPACED_NAME}[/\\])+")
"""An absolute path without quotation marks."""
_OF_OPTION = re.compile(rf"((?:^|(?<=\s))-[A-Za-z]+)(?:…|[A-Za-z]:)?[/\\](?:{_SPACED_NAME}[/\\])+")
_DIRECTORIES = re.compile(rf"(?:…|[A-Za-z]:)?[/\\](?:{_WORD}[/\\])+")
_SHAPES = ((_ABOVE, ""), (_QUOTED, "…/"), (_SPACED, "…/"), (_OF_OPTION, r"\1…/"), (_DIRECTORIES, "…/"))


def anonymous(text: str, paths: Iterable[str] = ()) -> str:
    """The text with every directory, the host's name and the user's taken out.

    Of a path only its last part stays, as in the plan. A user without a home folder has nothing to hide there.

    Args:
        text: what somebody else has written.
        paths: that are known to be in it perhaps, relative ones or with names that no pattern would find.
    """
    for directory in _directories([*paths, *_standing_paths()]):
        # A relative one is no end of another path.
        begins = "" if directory.is_absolute() else r"(?<![\w./\\-])(?:\.[/\\])?"
        text = re.sub(rf"{begins}{re.escape(str(directory))}[/\\]", "…/", text)
    for shape, shown in _SHAPES:
        text = shape.sub(shown, text)
    for name in filter(None, _names()):
        text = re.sub(rf"\b{re.escape(name)}\b", "…", text)
    return text


def without_prompt(text: str, source: PromptSource) -> str:
    """The text, or in its place `WITHHELD` if it repeats `COMMON` characters of the user's own prompt.

    Args:
        text: from an adapter that has seen the prompt.
        source: with the prompt's text; a sample text of ours may be repeated.
    """
    # The requests before a canary say it backwards.
    said = source.value or ""
    repeats = source.kind != "preset" and (_repeats(text, said) or _repeats(text, said[::-1]))
    return WITHHELD if repeats else text


def published(value: JsonValue, source: PromptSource, paths: Iterable[str] = ()) -> JsonValue:
    """A JSON value of an adapter as it may be written down: each text without prompt, paths and names.

    Texts of which something was taken out and that differed still do, since equal ones make aliases.

    Args:
        value: of an adapter that has seen the prompt.
        source: see `without_prompt`.
        paths: see `anonymous`.
    """
    match value:
        case str():
            public = anonymous(without_prompt(value, source), paths)
            return public if public == value else f"{public} {private.keyed_digest(value, or_for_now=True)}"
        case list():
            return [published(inner, source, paths) for inner in value]
        case dict():
            keys = (str(published(key, source, paths)) for key in value)
            return dict(zip(keys, (published(inner, source, paths) for inner in value.values()), strict=True))
    return value


def _standing_paths() -> Iterator[str]:
    """Where this process and its user are at home, whatever it is doing."""
    yield from (os.path.expanduser("~"), sys.prefix, sys.base_prefix)  # noqa: PTH111
    for folder in (tempfile.gettempdir, Path.cwd):
        with suppress(FileNotFoundError):  # somebody may have deleted it
            yield str(folder())


def _directories(paths: Iterable[str]) -> list[Path]:
    """The paths and all above them, as they are given and in full, the longest first."""
    given = [Path(path) for path in paths if path]
    every = [*given, *(path.absolute() for path in given), *(Path(os.path.realpath(path)) for path in given)]
    found = {one for path in every for one in (path, *path.parents) if one.name}
    return sorted(found, key=lambda one: len(str(one)), reverse=True)


def _names() -> Iterator[str]:
    """Of host and user, the longer form of a name before the shorter."""
    host = socket.gethostname()
    yield from (host, host.partition(".")[0])
    yield PurePath(os.path.expanduser("~")).name  # noqa: PTH111
    yield from (os.environ.get(variable, "") for variable in ("LOGNAME", "USER"))


def _repeats(text: str, prompt: str) -> bool:
    """Whether the two have a run in common, however spaced or escaped."""
    text, prompt = _plain(text), _filling(prompt)
    # Every run holds a block of half its length that starts at a multiple of it, and few texts share even such a block.
    half = COMMON // 2
    blocks = (text[start : start + half] for start in range(0, len(text) - half + 1, half))
    return any(block in prompt for block in blocks) and any(run in prompt for run in _runs(text))


@lru_cache(maxsize=1)
def _filling(prompt: str) -> str:
    """The prompt, a short one repeated as often as it takes to fill a run."""
    plain = _plain(prompt)
    return " ".join([plain] * (1 + COMMON // max(1, len(plain))))


def _plain(text: str) -> str:
    """The text without the escapes of a quoted one, and with single spaces."""
    text = _CODE_POINT.sub(lambda match: chr(int(match[1] or match[2], 16)), text)
    return " ".join(_WHITE.sub(" ", text).replace("\\", "").split())


def _runs(text: str) -> Iterator[str]:
    return (text[start : start + COMMON] for start in range(len(text) - COMMON + 1))
