"""Foreign strings made safe to show: labels, model ids and reasons may hold anything."""

from __future__ import annotations

import re
import unicodedata


class Markdown(str):
    """Text that is Markdown already; any other string is escaped on its way into a report."""

    __slots__ = ()


def one_line(text: str) -> str:
    """The text on one line: control and formatting characters, lone surrogates and line breaks become spaces."""
    visible = ("\n" if unicodedata.category(character)[0] in "CZ" else character for character in text)
    return " ".join("".join(visible).split())


_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\`*\[\]|~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_BLOCK_START = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[+=-]))(.)")
_AUTOLINK = re.compile(r"(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)


def escape(text: str) -> Markdown:
    """The text as Markdown that renders as exactly this text, on one line, in a paragraph, list or table cell."""
    escaped = _SPECIAL.sub(r"\\\g<0>", one_line(text))
    escaped = _AUTOLINK.sub(r"\\\g<0>", escaped)
    escaped = _BLOCK_START.sub(r"\1\\\2", escaped)
    return Markdown(re.sub("[&<>]", lambda match: _ENTITIES[match[0]], escaped))
