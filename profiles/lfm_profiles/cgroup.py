"""Limits of this process's control groups, versions 1 and 2: the group itself and all that it lies in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20


def memory_limits(root: Path) -> list[tuple[int, int | None, str]]:
    """(MiB, MiB free, who limits) of every group with a memory limit, the innermost first."""
    found = []
    for folder, version in _groups(root, "memory"):
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if version == 1
            else ("memory.max", "memory.current", "inactive_file")
        )
        most = _number(folder / names[0])
        if most is None or most >= 1 << 60:  # version 1's "no limit" is a page short of 2^63
            continue
        used = _number(folder / names[1])
        given_back = re.search(rf"^{names[2]} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
        free = None if used is None else max(0, most - used + (int(given_back[1]) if given_back else 0))
        found.append((most // MIB, None if free is None else free // MIB, f"control group {folder}"))
    return found


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that this process may use: the least of all its groups; None: no limit."""
    found = []
    for folder, version in _groups(root, "cpu"):
        if version == 1:
            quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        else:
            numbers = re.fullmatch(r"(\d+) (\d+)", _read(folder / "cpu.max"))  # "max 100000" where there is none
            quota, period = (int(numbers[1]), int(numbers[2])) if numbers else (None, None)
        if quota and period and quota > 0:
            found.append(quota / period)
    return min(found, default=None)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """(folder, version) of this process's group for a controller and of every group around it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 mounts controllers that belong together under one name, with a link of each one's own name.
        names = (controllers, controller) if controllers else ("",)
        top = next(
            (place for name in names if (place := root / "sys/fs/cgroup" / name).is_dir()), root / "sys/fs/cgroup"
        )
        # Inside a container the path is the host's, and its own group is mounted at the top.
        place = top / path.lstrip("/")
        for folder in (place, *(p for p in place.parents if p == top or top in p.parents)):
            yield folder, 1 if controllers else 2


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None
