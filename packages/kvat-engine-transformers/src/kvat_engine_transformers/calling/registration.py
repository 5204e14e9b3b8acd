"""Attention that Transformers knows only after it has been told: by an import here, by its own code in a snippet."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from kvat_core.engine import EngineError

_MODULES = {"xformers": "xformers_attention"}
"""Attention to the module that registers it when it is imported, and of which snippets carry the text."""


def register(attention: str) -> None:
    """Make Transformers know an attention by its name; nothing to do for those of its own.

    Raises:
        EngineError: the library that it calls cannot be imported.
    """
    if attention not in _MODULES:
        return
    try:
        importlib.import_module(f"kvat_engine_transformers.calling.{_MODULES[attention]}")
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise EngineError("unsupported", f"{attention} cannot be imported: {reason}") from error


def source(attention: str) -> str:
    """The same as source code that comes before a model is loaded; empty where there is nothing to do."""
    if attention not in _MODULES:
        return ""
    text = _text(attention)
    imports = [node.end_lineno for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(text.splitlines()[imports[-1] :]).strip()


def imports(attention: str) -> tuple[list[str], list[str]]:
    """What `source` needs beside torch: whole lines, and names of transformers."""
    if attention not in _MODULES:
        return [], []
    found = [node for node in ast.parse(_text(attention)).body if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in found if node.module == "transformers" for alias in node.names]
    return [ast.unparse(node) for node in found if node.module != "transformers"], names


def _text(attention: str) -> str:
    return Path(__file__).with_name(f"{_MODULES[attention]}.py").read_text(encoding="utf-8")
