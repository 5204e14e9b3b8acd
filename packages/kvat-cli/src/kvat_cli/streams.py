"""Standard output and error, and whoever may not be there any more to read them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def fill_in_closed() -> None:
    """Have standard streams that are closed from the start lead nowhere, or the next pipe would take their place."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest number that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115


@contextmanager
def suppress_lost_terminal() -> Iterator[None]:
    """Do without what cannot be shown; a pipe whose reader went away is still told to the caller."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def let_go() -> None:
    """Throw away what cannot be written; the interpreter would try again when it exits, and end with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
