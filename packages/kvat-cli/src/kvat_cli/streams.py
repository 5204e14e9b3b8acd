"""Standard output and error, and whoever may not be there any more to read them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
