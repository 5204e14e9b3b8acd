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


class NotDecided(KvatError):
    """What has been measured so far does not suffice; a run that goes on may."""

    exit_code = 3


class AllFailed(KvatError):
    """Every candidate failed; the journal holds each reason."""

    exit_code = 5


class JournalDamaged(KvatError):
    """A journal whose records do not verify; nothing is read from it and nothing is changed."""


class CannotWrite(KvatError):
    """A result cannot be written, e.g. because the disk is full; what had been written before is still there."""


class Interrupted(KvatError):
    """The user ended the run; what had been measured is in the journal."""

    exit_code = 130


class BudgetUsedUp(Interrupted):
    """The run has had the time, or the launches, that it may take; what had been measured is in the journal."""

    exit_code = 3


class EndedAtOnce(KvatError):
    """The user has ended the run a second time, and what it had started goes on regardless."""

    exit_code = 130


class Paused(KvatError):
    """The machine, not a candidate, is in the way of going on; what had been measured is in the journal."""
