"""The one place where an exception becomes a line on standard error and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import signal
import sys
import traceback
from collections.abc import Sequence

import typer

from kvat_cli.app import app
from kvat_cli.streams import fill_in_closed, let_go, suppress_lost_terminal
from kvat_report.text import one_line

INTERNAL_ERROR = 70
INTERRUPTED = 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: words after `kvat`; None for those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Taken out before parsing, so that it works at every place in the line and for errors of parsing, too.
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"] or ["--help"]
    fill_in_closed()
    _never_fail_to_encode()
    try:
        return _run(words, debug)
    finally:
        let_go()
        if arguments is None:
            # Nothing is left but the interpreter's own end, which would turn Ctrl-C into another exit code.
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(words: list[str], debug: bool) -> int:
    try:
        code = app(words, prog_name="kvat", standalone_mode=False) or 0
        with suppress_lost_terminal():
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    # The reader of standard output went away; typer turns that into an exit with code 1, which means something else.
    except (BrokenPipeError, SystemExit):
        return INTERRUPTED
    except Exception as error:
        if debug:
            _tell(traceback.format_exc().rstrip())
        return _explain(error)
    if code == INTERRUPTED:
        _tell("kvat: error: interrupted; if a run had begun, go on with --resume")
    return int(code)


def _never_fail_to_encode() -> None:
    """A label that the terminal's encoding lacks must not spoil the end of a long run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _explain(error: Exception) -> int:
    # Not at the top: it imports pydantic, which `kvat --help` does not need.
    from kvat_core.errors import KvatError

    # Where both lead to the same place, the end of the output comes before what is to be said of it.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if isinstance(error, KvatError):
        return _say(str(error), error.exit_code)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        # Of a file it would have been told in words of its own.
        return _say(f"standard output cannot be written ({error.strerror}); lead it elsewhere", 2)
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "kvat"
        return _say(f"{error.format_message().rstrip('.')}; see {command} --help", error.exit_code)
    # The type alone: the text of a foreign exception may hold a prompt.
    return _say(f"internal error ({type(error).__name__}); repeat with --debug for the traceback", INTERNAL_ERROR)


def _say(message: str, code: int) -> int:
    _tell(f"kvat: error: {one_line(message)}")
    return code


def _tell(text: str) -> None:
    """Lines on standard error; whoever is no longer there to read them gets the exit code all the same."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)
