"""What control groups allow this process: its own one and all above it, in either version.

A container shows its own group as the mount's root; a batch system or a service manager limits a group further down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryLimit:
    """Memory of one group, bytes."""

    limit_bytes: int
    used_bytes: int
    file_cache_bytes: int
    """Part of what is used: charged to the group, and given up as soon as memory is wanted."""


def memory_limits() -> list[MemoryLimit]:
    """One for each group that has a limit; in the older version one without has a limit that nobody reaches."""
    return [limit for folder in _folders("memory") if (limit := _memory_limit(folder)) is not None]


def quota_cores() -> float | None:
    """CPU time per time that the narrowest group allows, in cores; None without a limit."""
    quotas = [quota for folder in _folders("cpu") if (quota := _quota_cores(folder)) is not None]
    return min(quotas, default=None)


def oom_kills() -> int | None:
    """How often the kernel has killed for lack of memory, in this process's group if it tells; None if nobody does."""
    files = (*(folder / "memory.events" for folder in _folders("memory")), Path("/proc/vmstat"))
    file = next((one for one in files if one.is_file()), None)
    return None if file is None else _table(file).get("oom_kill")


def _folders(controller: str) -> Iterator[Path]:
    """Folders of this process's group and of those above it, from the inside out."""
    unified, legacy = _groups(controller)
    for root, group in ((MOUNT, unified), (MOUNT / controller, legacy)):
        for part in (group, *group.parents):
            folder = root / part.relative_to("/")
            # Of a group outside this process's view there is nothing to be seen.
            if folder.is_dir():
                yield folder


def _groups(controller: str) -> tuple[PurePosixPath, PurePosixPath]:
    """Path of this process's group in the unified hierarchy, and in the controller's own."""
    root = PurePosixPath("/")
    lines = MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.is_file() else []
    found = {
        name: PurePosixPath(path)
        for line in lines
        for _, names, path in [line.split(":", 2)]
        for name in names.split(",")
    }
    unified, legacy = (found.get(name, root) for name in ("", controller))
    return (root if ".." in unified.parts else unified), (root if ".." in legacy.parts else legacy)


def _memory_limit(folder: Path) -> MemoryLimit | None:
    limit, used = (
        _number(folder, "memory.max", "memory.limit_in_bytes"),
        _number(folder, "memory.current", "memory.usage_in_bytes"),
    )
    if limit is None or used is None:
        return None
    return MemoryLimit(limit, used, _file_cache_bytes(folder / "memory.stat"))


def _number(folder: Path, unified: str, legacy: str) -> int | None:
    """A figure by its name in either version; None without one, or where it is unlimited."""
    text = next((file.read_text().strip() for file in (folder / unified, folder / legacy) if file.is_file()), "")
    return int(text) if text.isdigit() else None


def _file_cache_bytes(stat: Path) -> int:
    table = _table(stat) if stat.is_file() else {}
    # In the older version only the totals include the groups below, as the use does.
    return sum(table.get(f"total_{name}", table.get(name, 0)) for name in ("active_file", "inactive_file"))


def _quota_cores(folder: Path) -> float | None:
    unified = folder / "cpu.max"
    legacy = [file for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us") if (file := folder / name).is_file()]
    words = unified.read_text().split() if unified.is_file() else [file.read_text().strip() for file in legacy]
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdigit() else None


def _table(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {
        words[0]: int(words[1])
        for line in file.read_text().splitlines()
        if len(words := line.split()) == 2 and words[1].isdigit()
    }
