"""Sample texts that fill prompts where the user brings none."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from kvat_core.errors import UsageError
from kvat_core.schema import PromptSource


def names() -> tuple[str, ...]:
    """Names of the sample texts."""
    folder = files("kvat_core.prompts")
    return tuple(sorted(entry.name[:-4] for entry in folder.iterdir() if entry.name.endswith(".txt")))


MAX_BYTES = 4 * 2**20
"""A longer text is refused: it travels to the worker with every call."""


def resolve(source: PromptSource) -> PromptSource:
    """The source with its text in `value`, whatever its kind.

    Raises:
        UsageError: unknown sample, unreadable file, no text, or too much of it.
    """
    text = _text(source)
    if len(text.encode()) > MAX_BYTES:
        raise UsageError(f"the profile's prompt is longer than {MAX_BYTES // 2**20} MiB; give a shorter text")
    return source.model_copy(update={"value": text})


def _text(source: PromptSource) -> str:
    if not source.value:
        raise UsageError("the profile's prompt has no value; give a preset name, a text or a file")
    if source.kind == "text":
        return source.value
    if source.kind == "file":
        return _file_text(Path(source.value))
    if source.value not in names():
        raise UsageError(f"unknown prompt preset {source.value!r}; use one of {', '.join(names())}")
    return files("kvat_core.prompts").joinpath(f"{source.value}.txt").read_text(encoding="utf-8")


def _file_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read the profile's prompt file ({getattr(error, 'strerror', None) or 'no text in UTF-8'}); "
            "give a UTF-8 text file"
        ) from error
    if not text.strip():
        raise UsageError("the profile's prompt file is empty; give a UTF-8 text file")
    return text
