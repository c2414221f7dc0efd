"""Energy and power over stretches of time: from the machine's own sensor, or from a power meter's samples."""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lfm_runtime.errors import SettingError

from lfm_audit.measure.watch import StateSample

_SHORTEST_S = 0.1


@dataclass(frozen=True)
class Power:
    """What a stretch of time cost. With `meter`, (Unix time in s, W) samples, the sensor's values are not used."""

    meter: Sequence[tuple[float, float]] = ()

    def joules(self, states: Sequence[StateSample], begin: float, end: float) -> float | None:
        """Between two time.perf_counter() moments: a counter's difference, or power integrated by trapezoids. None
        where nothing measured it, or the meter was not running.
        """
        if self.meter:
            late = states[0].unix_s - states[0].at
            times = [at - late for at, _ in self.meter]
            inside = times[0] <= begin and end <= times[-1]
            return integral(times, [watt for _, watt in self.meter], begin, end) if inside else None
        counters = [
            (s.at, s.reading.energy_uj, s.reading.energy_range_uj or 0)
            for s in states
            if s.reading.energy_uj is not None
        ]
        if len(counters) > 1:
            joules = [0.0]
            for (_, before, _), (_, after, wraps_at) in itertools.pairwise(counters):
                step = (after or 0) - (before or 0)
                joules.append(joules[-1] + (step if step >= 0 else step + wraps_at) / 1e6)
            times = [at for at, _, _ in counters]
            return float(np.interp(end, times, joules) - np.interp(begin, times, joules))
        powers = [(s.at, s.reading.power_w) for s in states if s.reading.power_w is not None]
        return integral([at for at, _ in powers], [watt for _, watt in powers], begin, end) if len(powers) > 1 else None

    def mean_w(self, states: Sequence[StateSample]) -> float | None:
        """Return the mean power in W from the first state to the last; None where nothing measured it."""
        return self.mean_w_of([states])

    def mean_w_of(self, stretches: Sequence[Sequence[StateSample]]) -> float | None:
        """Return the mean power in W over several stretches of time, weighted by length; None where not measured."""
        pairs = [
            (self.joules(states, states[0].at, states[-1].at), states[-1].at - states[0].at) for states in stretches
        ]
        known = [(joules, seconds) for joules, seconds in pairs if joules is not None]
        seconds = sum(s for _, s in known)
        return sum(joules for joules, _ in known) / seconds if seconds > 0 else None

    def watts(self, states: Sequence[StateSample]) -> list[float]:
        """Return single power values in W, of which the largest is the peak."""
        if self.meter:
            return [watt for at, watt in self.meter if states[0].unix_s <= at <= states[-1].unix_s]
        steps = [self.mean_w(pair) for pair in itertools.pairwise(states) if pair[1].at - pair[0].at > _SHORTEST_S]
        return [watt for watt in steps if watt is not None]


def integral(times: Sequence[float], values: Sequence[float], begin: float, end: float) -> float:
    """Return the integral from `begin` to `end` of values linear between `times` and constant outside of them."""
    inside = [(t, v) for t, v in zip(times, values, strict=True) if begin < t < end]
    points = [(begin, float(np.interp(begin, times, values))), *inside, (end, float(np.interp(end, times, values)))]
    return sum((t1 - t0) * (v0 + v1) / 2 for (t0, v0), (t1, v1) in itertools.pairwise(points))


def check_meter(path: Path) -> None:
    """Before long work: raise SettingError where the meter's file, which is read at the end, has other columns."""
    if not path.parent.is_dir():
        raise SettingError(f"{path.parent} is not a folder: no meter can write {path.name} there; check the path")
    if not path.exists():
        print(f"lfm-edge: {path} does not exist yet; it is read at the end", file=sys.stderr)
        return
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            columns = csv.DictReader(f).fieldnames
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise SettingError(f"{path} cannot be read as a meter's CSV ({e})") from e
    if columns is not None and not {"time_s", "power_w"} <= set(columns):
        raise SettingError(
            f"{path} has the columns {', '.join(columns)}; a meter's CSV has time_s (Unix time) and power_w"
        )


def read_meter(path: Path) -> list[tuple[float, float]]:
    """A power meter's CSV: a header with time_s (Unix time, s) and power_w, one sample a line.

    Raises:
        SettingError: not such a file.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            rows = [(float(row["time_s"]), float(row["power_w"])) for row in csv.DictReader(f)]
    except OSError as e:
        raise SettingError(f"{path} cannot be read: {e.strerror}") from e
    except (KeyError, TypeError, ValueError) as e:
        raise SettingError(
            f"{path} is not a meter's CSV with the columns time_s (Unix time) and power_w ({type(e).__name__}: {e})"
        ) from e
    if len(rows) < 2 or sorted(rows) != rows:
        raise SettingError(f"{path} needs two samples at least, in the order of time")
    return rows
