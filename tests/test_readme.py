"""What the documents tell a reader to type is what there is."""

import ast
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer

from kvat_cli.app import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")])
SETUP = "python3.11 -m venv .venv && .venv/bin/pip install -q nox && .venv/bin/nox -s"


def commands(document: Path) -> Iterator[str]:
    """The lines of the fenced blocks of a document, continued ones joined, prompts removed."""
    for block in re.findall(r"^```\w*\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.strip().removeprefix("$ ")


def kvat_commands() -> list[str]:
    return sorted({line for document in DOCUMENTS for line in commands(document) if line.startswith("kvat ")})


def session_names() -> set[str]:
    """The functions of the noxfile that are sessions."""
    statements = ast.parse((ROOT / "noxfile.py").read_text()).body
    return {node.name for node in statements if isinstance(node, ast.FunctionDef) and is_session(node)}


def is_session(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("nox.session") for decorator in function.decorator_list)


@pytest.mark.parametrize("session", ["demo", "test"])
def test_the_readme_sets_up_and_runs(session: str) -> None:
    assert f"{SETUP} {session}" in commands(README)
    assert session in session_names()


def test_ci_runs_what_the_readme_says() -> None:
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert f"{SETUP} test" in lines


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_session_a_document_names_exists(document: Path) -> None:
    named = set(re.findall(r"nox -s ([a-z]+)\b(?![-.(])", document.read_text()))
    assert named <= session_names()


@pytest.mark.parametrize("command", kvat_commands())
def test_the_command_line_knows_every_command_shown(command: str) -> None:
    assert refusal(command) is None


@pytest.mark.parametrize(
    "command",
    ["kvat tuna", "kvat tune --spice full", "kvat tune --space bogus", "kvat tune --threads none", "kvat plan"],
)
def test_a_command_that_does_not_exist_would_be_noticed(command: str) -> None:
    assert refusal(command) is not None


def refusal(command: str) -> str | None:
    """Why the command line would not take a command, which is parsed with its values and not carried out; or None."""
    _, *words = shlex.split(command, comments=True)
    words = list(takewhile(lambda word: word not in ("|", ">"), words))
    commands: Any = typer.main.get_command(app)
    try:
        context = commands.make_context("kvat", words)
        name, chosen, rest = commands.resolve_command(context, [*context._protected_args, *context.args])
        chosen.make_context(name, rest, parent=context)
    except typer.Exit:  # by --help and --version
        return None
    except Exception as error:  # the class of these errors is no part of what typer publishes
        return f"{type(error).__name__}: {error}"
    return None
