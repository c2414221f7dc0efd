"""What work leaves in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

from lfm_runtime.report import memory_mib

_SHARE = 0.01
_LEAST_MIB = 2.0


def allowed_growth(before: float) -> float:
    """MiB that may be added to so many without being a leak."""
    return max(_SHARE * before, _LEAST_MIB)


def least_growth(work: Callable[[], None]) -> tuple[float, float]:
    """(what the work adds to anonymous memory, how much there was before), MiB. What is kept once is no leak: where it
    grew, the work is done again, twice at most, and the smallest growth counts.
    """
    found: list[tuple[float, float]] = []
    while len(found) < 3 and all(grown > allowed_growth(before) for grown, before in found):
        before = _anonymous()
        work()
        found.append((_anonymous() - before, before))
    return min(found)


def _anonymous() -> float:
    gc.collect()
    return (found := memory_mib())["rss_anon"] or found["rss"] or 0.0
