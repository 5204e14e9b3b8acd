"""`kvat engines`: what is installed, and whether it works."""

from __future__ import annotations


def engines() -> None:
    """List the installed engines, usable or not.

    One that cannot be used is named with its package, its version and the cause.
    """
    from kvat_cli.columns import columns
    from kvat_core.discovery import engine_statuses

    rows = [
        (engine.name, engine.distribution, engine.version, engine.state.replace("_", " "), engine.cause or "")
        for engine in engine_statuses()
    ]
    print(columns([("NAME", "DISTRIBUTION", "VERSION", "STATE", "CAUSE"), *rows]))
