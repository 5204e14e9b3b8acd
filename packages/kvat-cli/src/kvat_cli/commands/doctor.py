"""`kvat doctor`: is this machine fit for measuring?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvat_core.schema import Machine


def doctor() -> None:
    """Show this machine, and what makes its measurements noisy.

    Keeps all cores busy for a second to see who else wants them. Each
    finding says what to do about it. The installed engines follow.
    """
    from kvat_cli.columns import columns
    from kvat_cli.commands.engines import engines
    from kvat_core.machine import read_machine
    from kvat_core.noise import standing_findings, tried_findings

    print(columns(_facts(read_machine("cpu", None))))
    findings = [*standing_findings(), *tried_findings()]
    print("\nNoise:" if findings else "\nNoise: nothing found that disturbs measurements")
    for finding in findings:
        print(f"- {finding}")
    print("\nEngines:")
    engines()


def _facts(machine: Machine) -> list[tuple[str, str]]:
    from kvat_report import numbers

    gpus = [
        ("GPU", f"{gpu.name}, {numbers.size(gpu.memory_bytes)}, driver {gpu.driver or 'unknown'}")
        for gpu in machine.gpus
    ]
    return [
        ("CPU", f"{machine.cpu}, {machine.cores} usable cores"),
        ("memory", numbers.size(machine.memory_bytes)),
        *(gpus or [("GPU", "none found")]),
        ("system", machine.os),
        ("Python", machine.python),
    ]
