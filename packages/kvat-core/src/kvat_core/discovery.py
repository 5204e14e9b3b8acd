"""Find engines, searches and reports that are installed, load them on demand, and name the broken ones.

Listing reads metadata only; a package is imported when it is asked for. The list is read
once per process, so a package installed meanwhile is seen by the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar, cast

from kvat_core.engine import CONTRACT, Engine
from kvat_core.errors import UsageError
from kvat_core.report import Report

ENGINES = "kvat.engines"
"""Entry-point group of engine adapters."""
REPORTS = "kvat.reports"
"""Entry-point group of report renderers."""

_Loaded = TypeVar("_Loaded")

EngineState = Literal["ok", "broken", "duplicate", "too_new"]

_OWN_DISTRIBUTION = "kvat-core"
_INSTALL = "pip install kvat-engine-NAME"


@dataclass(frozen=True)
class EngineStatus:
    """One registered engine, and whether it can be used."""

    name: str
    distribution: str
    version: str
    state: EngineState
    cause: str | None
    """Why it cannot be used, in one line; None for a usable one."""


@dataclass(frozen=True)
class _Registration:
    """An entry point together with the distribution that answers for it."""

    entry_point: EntryPoint
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


class Unusable(Exception):
    """A registration that was tried and cannot be used."""

    def __init__(self, state: EngineState, cause: str) -> None:
        super().__init__(cause)
        self.state: EngineState = state
        self.cause = cause


def engine_statuses() -> list[EngineStatus]:
    """Every registered engine by name; each is imported, and one that fails does not hide the others."""
    return [
        _status(name, registration, rivals)
        for name, rivals in _registrations(ENGINES).items()
        for registration in rivals
    ]


def load_engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        UsageError: not installed, broken, written for a newer contract, or registered twice.
    """
    registrations = _registrations(ENGINES)
    if name not in registrations:
        available = ", ".join(registrations) or "none"
        raise UsageError(
            f"no engine is called {name!r}; available: {available}; others come with their own package, e.g. {_INSTALL}"
        )
    try:
        return _load_only(registrations[name], _checked_engine)
    except Unusable as error:
        raise UsageError(_complaint("engine", name, registrations[name], error)) from error


def pick_engine(name: str | None, model: str | None) -> Engine:
    """The engine to use: the one named, else the model's own, else the only one installed.

    The demonstration engines of kvat-core are never chosen for being installed, only by name or by
    one of their own models.

    Raises:
        UsageError: no engine, several to choose from, or the chosen one cannot be used.
    """
    if name is not None:
        return load_engine(name)
    return load_engine(_owner(model) or _sole_installed())


def load_named(group: str, kind: str, name: str, checked: Callable[[str, Any], _Loaded]) -> _Loaded:
    """What is registered under a name in a group.

    Args:
        group: entry-point group.
        kind: what its members are, for messages.
        name: the one wanted.
        checked: makes what was loaded usable, or raises `Unusable`.

    Raises:
        UsageError: not installed, broken, or registered twice.
    """
    registrations = _registrations(group)
    if name not in registrations:
        raise UsageError(f"no {kind} is called {name!r}; choose one of {', '.join(registrations)}")
    try:
        return _load_only(registrations[name], checked)
    except Unusable as error:
        raise UsageError(_complaint(kind, name, registrations[name], error)) from error


def reports() -> tuple[list[Report], list[str]]:
    """Every usable report renderer by name, and one line for each that cannot be used."""
    usable: list[Report] = []
    complaints: list[str] = []
    for name, rivals in _registrations(REPORTS).items():
        try:
            usable.append(_load_only(rivals, _checked_report))
        except Unusable as error:
            complaints.append(_complaint("report", name, rivals, error))
    return usable, complaints


@cache
def _registrations(group: str) -> dict[str, tuple[_Registration, ...]]:
    """Who registers which name; the standard library already drops distributions shadowed on the path."""
    found: dict[str, list[_Registration]] = {}
    for entry_point in sorted(entry_points(group=group), key=lambda entry_point: entry_point.name):
        distribution = entry_point.dist
        if distribution is None:
            raise RuntimeError(f"entry point {entry_point.name!r} of {group} belongs to no distribution")
        registration = _Registration(entry_point, distribution.name, distribution.version)
        found.setdefault(entry_point.name, []).append(registration)
    return {name: tuple(sorted(rivals, key=str)) for name, rivals in found.items()}


def _load_only(rivals: tuple[_Registration, ...], checked: Callable[[str, Any], _Loaded]) -> _Loaded:
    """Load the one registration of a name; with rivals, none of them, so that none is preferred unseen."""
    if len(rivals) > 1:
        raise Unusable("duplicate", f"registered by {' and by '.join(map(str, rivals))}")
    (registration,) = rivals
    try:
        return checked(registration.entry_point.name, registration.entry_point.load())
    except Unusable:
        raise
    # SystemExit too: a package that exits at import must not end the command that merely lists it.
    except (Exception, SystemExit) as error:
        raise Unusable("broken", _one_line(error)) from error


def _checked_engine(name: str, found: Any) -> Engine:
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise Unusable("broken", "its entry point names no subclass of kvat_core.engine.Engine")
    if found.contract > CONTRACT:
        raise Unusable(
            "too_new", f"written for contract {found.contract}, this kvat-core supports {CONTRACT}; upgrade kvat-core"
        )
    check_name(name, found)
    return found()


def _checked_report(name: str, found: Any) -> Report:
    report = found()
    if not (callable(getattr(report, "render", None)) and isinstance(getattr(report, "file_name", None), str)):
        raise Unusable("broken", "its entry point names no class with file_name and render, as in kvat_core.report")
    check_name(name, report)
    return cast("Report", report)


def check_name(name: str, found: Any) -> None:
    """A class is registered under its own name.

    Raises:
        Unusable: it has another one.
    """
    actual = getattr(found, "name", None)
    if actual != name:
        raise Unusable("broken", f"registered as {name!r}, but the class is named {actual!r}")


def _status(name: str, registration: _Registration, rivals: tuple[_Registration, ...]) -> EngineStatus:
    try:
        _load_only(rivals, _checked_engine)
    except Unusable as error:
        return EngineStatus(name, registration.distribution, registration.version, error.state, error.cause)
    return EngineStatus(name, registration.distribution, registration.version, "ok", None)


def _owner(model: str | None) -> str | None:
    """The engine that alone understands the model; None where any may."""
    if model is None:
        return None
    usable = [load_engine(status.name) for status in engine_statuses() if status.state == "ok"]
    owners = [engine.name for engine in usable if _owns(engine, model)]
    if len(owners) > 1:
        raise UsageError(f"model {model!r} belongs to several engines: {', '.join(owners)}; choose one with --engine")
    return owners[0] if owners else None


def _owns(engine: Engine, model: str) -> bool:
    return any(model == own or (own.endswith(":") and model.startswith(own)) for own in engine.own_models)


def _sole_installed() -> str:
    names = [
        name
        for name, rivals in _registrations(ENGINES).items()
        if all(registration.distribution != _OWN_DISTRIBUTION for registration in rivals)
    ]
    if not names:
        raise UsageError(f"no engine is installed; {_INSTALL}, or see a demonstration with --engine fake")
    if len(names) > 1:
        raise UsageError(f"several engines are installed: {', '.join(names)}; choose one with --engine")
    return names[0]


def _complaint(kind: str, name: str, rivals: tuple[_Registration, ...], error: Unusable) -> str:
    if error.state == "duplicate":
        return f"{kind} {name!r} is {error.cause}; uninstall one of them"
    if error.state == "too_new":
        return f"{kind} {name!r} of {rivals[0]} is {error.cause}"
    return f"{kind} {name!r} of {rivals[0]} is broken: {error.cause}; repair or uninstall {rivals[0].distribution}"


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
