"""Samples and what they are worth: robust statistics, and whether two sets of samples differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

FOR_P95 = 20
_CONFIDENCE = 0.95


def figure(samples: Sequence[float]) -> dict[str, Any]:
    """What reports quote of samples (at least one): n, median, mad (median absolute deviation), mean, p90, p95 (None
    below 20 samples), min, max, low and high (the median's 95 % confidence interval, None below 6 samples), samples.
    """
    if not samples:
        raise ValueError("a figure needs a sample")
    ordered, median = sorted(samples), statistics.median(samples)
    low, high = interval(ordered)
    return {
        "n": len(ordered),
        "median": median,
        "mad": statistics.median(abs(x - median) for x in ordered),
        "mean": statistics.fmean(ordered),
        "p90": percentile(ordered, 90),
        "p95": percentile(ordered, 95) if len(ordered) >= FOR_P95 else None,
        "min": ordered[0],
        "max": ordered[-1],
        "low": low,
        "high": high,
        "samples": list(samples),
    }


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default."""
    at = (len(ordered) - 1) * percent / 100
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def interval(ordered: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % confidence interval of the median by order statistics, whatever the distribution (Conover, Practical
    Nonparametric Statistics, 3.2): the narrowest pair of ranks, equally far from both ends, that holds the median with
    that probability.
    """
    n, tail, rank = len(ordered), 0.0, -1
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if 1 - 2 * tail < _CONFIDENCE:
            break
        rank = k
    return (None, None) if rank < 0 else (ordered[rank], ordered[n - 1 - rank])


def separable(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the confidence intervals of two figures do not overlap. False where one has too few samples to tell."""
    bounds = [a["low"], a["high"], b["low"], b["high"]]
    return None not in bounds and (bounds[1] < bounds[2] or bounds[3] < bounds[0])


def spread(of: dict[str, Any]) -> float:
    """How far samples lie apart: the middle half's half width (its MAD) against the median."""
    return of["mad"] / of["median"] if of["median"] else 0.0
