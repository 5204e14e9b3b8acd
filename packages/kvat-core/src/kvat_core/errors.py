"""Errors that a user can act on: one line each, with the exit code of the command.

Everything else that escapes is a defect of kvat or of an adapter (exit code 70).
"""

from __future__ import annotations


class KvatError(Exception):
    """An expected end of a command: the message says what is wrong and what to do."""

    exit_code = 2


class UsageError(KvatError):
    """Unusable input or environment: nothing was started, nothing was touched."""


class NothingFeasible(KvatError):
    """Candidates were measured, but none may be recommended."""

    exit_code = 4


class AllFailed(KvatError):
    """Every candidate failed; the journal holds each reason."""

    exit_code = 5


class JournalDamaged(KvatError):
    """A journal whose records do not verify; nothing is read from it and nothing is changed."""
