"""Samples and what they are worth: robust statistics, and whether two sets of samples differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

FOR_P95 = 20
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """Statistics of a set of samples, and the samples."""

    n: int
    median: float
    mad: Annotated[float, "median absolute deviation"]
    mean: float
    p90: float
    p95: Annotated[float | None, "from 20 samples on"]
    min: float
    max: float
    low: Annotated[float | None, "the median's 95 % confidence interval, by order statistics; from 6 samples on"]
    high: float | None
    samples: tuple[float, ...]

    @staticmethod
    def of(samples: Sequence[float]) -> Figure:
        """Return the statistics of `samples`; raises ValueError where there is none."""
        if not samples:
            raise ValueError("a figure needs a sample")
        ordered, median = sorted(samples), statistics.median(samples)
        low, high = interval(ordered)
        return Figure(
            n=len(ordered),
            median=median,
            mad=statistics.median(abs(x - median) for x in ordered),
            mean=statistics.fmean(ordered),
            p90=percentile(ordered, 90),
            p95=percentile(ordered, 95) if len(ordered) >= FOR_P95 else None,
            min=ordered[0],
            max=ordered[-1],
            low=low,
            high=high,
            samples=tuple(samples),
        )

    @property
    def spread(self) -> float:
        """How far samples lie apart: the middle half's half width (the MAD) against the median."""
        return self.mad / self.median if self.median else 0.0


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of sorted values, interpolated linearly as numpy does by default."""
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


def separable(a: Figure, b: Figure) -> bool:
    """Whether the confidence intervals of two figures do not overlap. False where one has too few samples to tell."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.high < b.low or b.high < a.low
