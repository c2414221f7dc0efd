"""Which processors to use: one of each physical core, the fastest first. Hyper-threads share the vector units that
products wait for.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil

from lfm_profiles.cgroup import cpu_quota


def default_threads(root: Path = Path("/")) -> int:
    """Physical cores that this process may use, and has the time for under a control group's quota.

    More threads than the quota use it up together and then stand still together. Measured with a 450M on 2 cores: at a
    quota of 1.25 processors 2 threads are 1.17 times as fast as 1 to the first token, at 1.5 1.29 times; at 1.1 they
    are 1.13 times as slow.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(1, min(usable, _physical() or usable, math.ceil(quota - 0.2) if quota else usable))


def _physical() -> int | None:
    try:
        found: int | None = psutil.cpu_count(logical=False)
    except OSError:  # /proc without what is not a process (subset=pid)
        return None
    return found


def physical_cores(root: Path = Path("/"), usable: set[int] | None = None) -> list[int]:
    """One processor number of each physical core this process may use, cores of highest frequency first; [] where that
    cannot be known.
    """
    if usable is None:
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    found: dict[str, tuple[int, int]] = {}
    for number in sorted(usable):
        folder = root / f"sys/devices/system/cpu/cpu{number}"
        siblings = _read(folder / "topology/thread_siblings_list") or str(number)
        speed = int(_read(folder / "cpu_capacity") or _read(folder / "cpufreq/cpuinfo_max_freq") or 0)
        found.setdefault(siblings, (-speed, number))
    return [number for _, number in sorted(found.values())]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None
