"""A search for settings as far as it has come: the points measured, their front, what is chosen, kept on disk."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort
from lfm_profiles import VARIANTS, Profile, changed, cpu_features, default_threads
from lfm_runtime import __version__
from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import SettingError, counted
from lfm_runtime.formats.files import write_whole
from lfm_runtime.setup.machine import this_machine
from lfm_runtime.setup.setup import settle

from lfm_audit.tune.result import Key, PointResult, TuningResult

Objective = Literal["latency", "memory", "energy"]
OBJECTIVES = ("latency", "memory", "energy")


FLOOR = 0.1
"""Nats a token: what quantize asks of int4."""


_CLEARLY = {1: 1.25, 2: 1.10, 3: 1.05, 4: 1.03, 6: 1.0}
"""From so many rounds together on: how much slower one must have been in every one of them to be dropped."""


_TELLING = 4
"""Rounds from which on a difference of a few percent is told from chance."""


_SAME_MEMORY, _SAME_KL = 1.02, 1.1
"""Less than such a factor is no difference."""


_SHOWN = 20


Point = tuple[tuple[str, Any], ...]
"""Settings by axis, sorted; hashable."""


@dataclass
class Measured:
    """Measurements of one point; samples are keyed by round."""

    latency_ms: dict[int, float] = field(default_factory=dict)  # an answer, its model loaded
    ttft_ms: dict[int, float] = field(default_factory=dict)
    peak_mib: float = 0.0
    anonymous_mib: float = 0.0
    energy_j: dict[int, float] = field(default_factory=dict)  # an answer
    kl: float | None = None  # nats a token, against the reference
    failed: str | None = None

    @property
    def latency(self) -> float:
        """Median latency of an answer, in ms."""
        return statistics.median(self.latency_ms.values())

    @property
    def energy(self) -> float:
        """Median energy of an answer, in J; infinite where nothing measured it."""
        return statistics.median(self.energy_j.values()) if self.energy_j else math.inf


@dataclass
class Tuning:
    """A search: what it is for, and the points measured so far."""

    bundle: Bundle
    profile: Profile
    images: Sequence[Path]
    question: str
    objective: Objective
    floor: float
    axes: Mapping[str, Sequence[Any]]
    points: dict[Point, Measured] = field(default_factory=dict)
    rounds: int = 0
    reference: str = ""

    def front(self) -> list[Point]:
        """Points that no other beats in everything, the best for the objective first."""
        there = [p for p, m in self.points.items() if m.latency_ms and not m.failed]
        left = [p for p in there if not any(self._beats(q, p) for q in there if q != p)]
        return sorted(left, key=self._rank)

    def chosen(self) -> Point:
        """The best for the objective. Of several that chance may have put in this order those of the least memory, and
        of these the one nearest to the profile; none that another of them outdoes in everything.
        """
        same = self._alike()
        same = [p for p in same if not any(self._outdoes(q, p) for q in same)]
        least = min(self.points[p].peak_mib for p in same)
        same = [p for p in same if self.points[p].peak_mib <= least * _SAME_MEMORY]
        base = dict(self.first_point())
        return min(same, key=lambda p: (sum(value != base[axis] for axis, value in p), self._rank(p)))

    def why(self) -> str:
        """Why the chosen point was chosen, in words that agree with the table."""
        best, chosen, alike = self.front()[0], self.chosen(), self._alike()
        allowed = f"KL ≤ {self.floor:g}" if self.good_enough(chosen) else "whatever its KL"
        rounds = len(self.points[chosen].latency_ms)
        few = (
            f"; {counted(rounds, 'sample')} of it {'tells' if rounds == 1 else 'tell'} little, give it more time"
            if rounds < _TELLING
            else ""
        )
        if len(alike) == 1:
            return f"best by {self.objective} with {allowed}{few}"
        among = f"of {len(alike)} points whose {self.objective} differs by no more than chance ({allowed})"
        if chosen == best:
            return f"{among}, the best, which also takes the least memory (within {_SAME_MEMORY - 1:.0%}){few}"
        least = f"one with the least memory (within {_SAME_MEMORY - 1:.0%})"
        return f"{among}, {least}; of these the settings nearest to profile {self.profile.name}{few}"

    def _alike(self) -> list[Point]:
        """The best for the objective, and those that chance may have put behind it."""
        first, *others = self.front()
        alike = [first]
        for point in others:  # the first may have met it in few rounds, another that was measured more often in many
            if self._rank(point)[0] == self._rank(first)[0] and not any(self._differ(p, point) for p in alike):
                alike.append(point)
        return alike

    def first_point(self) -> Point:
        """Return the point of the axes that is nearest to the profile's own settings."""
        setup = settle(self.bundle, self.profile)
        variant, prefill, images = setup.variant, setup.prefill, setup.images
        values = {
            "variant": variant,
            "prefill": VARIANTS[prefill].float_keys if prefill else "none",
            "threads": self.profile.threads or default_threads(),
            "low_memory": self.profile.low_memory,
            "arena": self.profile.arena,
            "max_image_tokens": images.max_image_tokens,
            "tiles": images.max_tiles if images.do_image_splitting else 1,
        }
        return tuple(sorted((axis, _nearest(value, self.axes[axis])) for axis, value in values.items()))

    def good_enough(self, point: Point) -> bool:
        """Whether the point's KL divergence was measured and is not above the floor."""
        kl = self.points[point].kl
        return kl is not None and kl <= self.floor

    def profile_of(self, point: Point, description: str = "") -> Profile:
        """Return the profile, changed to the settings of `point`."""
        values = dict(point)
        tiles, variant = values.pop("tiles"), values.pop("variant")
        values |= {"variant": (VARIANTS[variant].float_keys,), "kv": VARIANTS[variant].keys}
        if len(self.axes["tiles"]) > 1:  # else tiles were not tried: these images need none, or a flag says how many
            values |= {"do_image_splitting": True, "max_tiles": tiles} if tiles > 1 else {"do_image_splitting": False}
        if self.profile.min_image_tokens and self.profile.min_image_tokens > values["max_image_tokens"]:
            values["min_image_tokens"] = values["max_image_tokens"]
        return replace(changed(self.profile, values, "tune"), description=description)

    def _rank(self, point: Point) -> tuple[bool, float, float]:
        m = self.points[point]
        cost = {"latency": lambda: m.latency, "memory": lambda: m.peak_mib, "energy": lambda: m.energy}[
            self.objective
        ]()
        return (not self.good_enough(point), cost, m.latency)

    def _beats(self, a: Point, b: Point) -> bool:
        """Whether a is faster than b beyond chance, and neither larger nor worse."""
        one, other = self.points[a], self.points[b]
        lost, theirs = (math.inf if m.kl is None else m.kl for m in (one, other))
        if one.peak_mib > other.peak_mib * _SAME_MEMORY or lost > theirs * _SAME_KL + 1e-6:
            return False
        return _slower(other.latency_ms, one.latency_ms)

    def _outdoes(self, a: Point, b: Point) -> bool:
        """Whether a is no worse than b in anything, and has less memory or KL than chance would give it."""
        one, other = self.points[a], self.points[b]
        lost, theirs = (math.inf if m.kl is None else m.kl for m in (one, other))
        if self._rank(a) > self._rank(b) or one.latency > other.latency:
            return False
        if one.peak_mib > other.peak_mib or lost > theirs:
            return False
        return one.peak_mib * _SAME_MEMORY < other.peak_mib or lost * _SAME_KL + 1e-6 < theirs

    def _differ(self, a: Point, b: Point) -> bool:
        one, other = self.points[a], self.points[b]
        if self.objective == "memory":
            return other.peak_mib > one.peak_mib * _SAME_MEMORY
        pairs = (one.latency_ms, other.latency_ms) if self.objective == "latency" else (one.energy_j, other.energy_j)
        return _slower(pairs[1], pairs[0])

    def table(self) -> str:
        """Return the front as a text table, best point first; the chosen point has a star."""
        chosen = self.chosen()
        energy = any(m.energy_j for m in self.points.values())
        head = (
            f"  {'variant':9s} {'prefill':7s} {'threads':>7s} {'tokens':>6s} {'tiles':>5s} {'arena':5s} "
            f"{'low_memory':10s}   "
        )
        head += (
            f"{'answer ms':>22s} {'ttft ms':>8s} {'MiB':>6s} {'anon.':>6s} {'KL':>8s}{'       J' if energy else ''}   n"
        )
        lines = [head]
        front = self.front()
        for point in dict.fromkeys((*front[:_SHOWN], chosen)):
            at, m = dict(point), self.points[point]
            samples = sorted(m.latency_ms.values())
            spread = f"{m.latency:,.0f} ({samples[0]:,.0f}…{samples[-1]:,.0f})"
            joules = (f" {m.energy:7.2f}" if m.energy_j else " " * 8) if energy else ""
            arena, low = ("on" if at[axis] else "off" for axis in ("arena", "low_memory"))
            lines.append(
                f"{'*' if point == chosen else ' '} {at['variant']:9s} {at['prefill']:7s} {at['threads']:7d} "
                f"{at['max_image_tokens']:6d} "
                f"{at['tiles'] if at['tiles'] > 1 else '–':>5} {arena:5s} {low:10s}   "
                f"{spread:>22s} {statistics.median(m.ttft_ms.values()):8,.0f} {m.peak_mib:6,.0f} "
                f"{m.anonymous_mib:6,.0f} "
                f"{m.kl or 0:8.4f}{joules} {len(samples):3d}"
            )
        if len(front) > _SHOWN:
            lines.append(f"  … and {len(front) - _SHOWN} more on the Pareto front")
        return "\n".join(lines)

    def summary(self) -> str:
        """Return the table, and notes on how it was measured."""
        points, failed = len(self.points), [m.failed for m in self.points.values() if m.failed]
        lines = [
            self.table(),
            f"\n{counted(points, 'point')} in {counted(self.rounds, 'round')}; answers of 32 tokens; KL to "
            f"{self.reference} with the checkpoint's own image settings; *: {self.why()}",
        ]
        if failed:
            lines.append(f"{len(failed)} points could not be measured: {failed[0]}")
        if not self.good_enough(self.chosen()):
            lines.append(
                f"no point measured has a KL of {self.floor:g} or less: the best of the others is chosen; see --floor"
            )
        return "\n".join(lines)

    # --------------------------------------------------------------------------------------------------- kept on disk

    def key(self) -> Key:
        """Return what measurements must have in common to be of this search."""
        paths = {path for graphs in self.bundle.variants.values() for path in graphs.values()}
        return Key(
            bundle=tuple(sorted(part for path in paths for part in self.bundle.fingerprint(path))),
            onnxruntime=ort.__version__,
            machine=platform.machine(),
            cpu_features=tuple(cpu_features()),
            images=tuple(str(p.resolve()) for p in self.images),
            question=self.question,
        )

    def result(self) -> TuningResult:
        """All points, the front and the chosen point, as they are kept."""
        device = this_machine().device
        return TuningResult(
            tool="lfm-edge tune",
            version=__version__,
            key=self.key(),
            objective=self.objective,
            floor_kl=self.floor,
            rounds=self.rounds,
            reference=self.reference,
            profile=self.profile.name,
            front=tuple(dict(p) for p in self.front()),
            chosen=dict(self.chosen()),
            points=tuple(_kept(p, m) for p, m in self.points.items()),
            bundle=self.bundle.folder.resolve().name,
            machine=device.board or device.cpu or device.machine,
            created_unix_s=round(time.time(), 3),
            why=self.why(),
        )

    def save(self, path: Path) -> None:
        """Write the result to `path` as JSON."""
        write_whole(path, self.result().to_text())

    def resume(self, path: Path) -> bool:
        """Take up what an earlier search of the same kind measured; whether there was one.

        Raises:
            SettingError: the file is of another search or another program, or damaged.
        """
        if not path.exists():
            return False
        found = TuningResult.read(path, SettingError, "remove it to begin anew")
        if found is None:
            raise SettingError(f"{path} was not written by lfm-edge tune; write another profile with -o")
        if found.key != self.key():
            raise SettingError(
                f"{path} is of another bundle, machine, images or question; remove it, or write another profile with -o"
            )
        self.rounds, self.reference = found.rounds, found.reference
        for kept in found.points:
            point = tuple(sorted(kept.settings.items()))
            if all(value in self.axes.get(axis, ()) for axis, value in point):  # else a flag leaves it out now
                self.points[point] = Measured(
                    latency_ms=_by_round(kept.latency_ms),
                    ttft_ms=_by_round(kept.ttft_ms),
                    peak_mib=kept.peak_mib,
                    anonymous_mib=kept.anonymous_mib,
                    energy_j=_by_round(kept.energy_j),
                    kl=kept.kl,
                    failed=kept.failed,
                )
        return True


def _kept(point: Point, m: Measured) -> PointResult:
    return PointResult(
        settings=dict(point),
        latency_ms={str(n): ms for n, ms in m.latency_ms.items()},
        ttft_ms={str(n): ms for n, ms in m.ttft_ms.items()},
        peak_mib=m.peak_mib,
        anonymous_mib=m.anonymous_mib,
        energy_j={str(n): joules for n, joules in m.energy_j.items()},
        kl=m.kl,
        failed=m.failed,
    )


def _by_round(samples: Mapping[str, float]) -> dict[int, float]:
    return {int(n): value for n, value in samples.items()}


def _nearest(value: Any, values: Sequence[Any]) -> Any:
    if value in values:
        return value
    return min(values, key=lambda v: abs(v - value)) if isinstance(value, int) else values[0]


def _slower(a: Mapping[int, float], b: Mapping[int, float]) -> bool:
    """Whether a was slower than b beyond chance, by the rounds that have both; where none has, by the medians."""
    if not a or not b:
        return False
    ratios = [a[n] / b[n] for n in a.keys() & b.keys()] or [
        statistics.median(a.values()) / statistics.median(b.values())
    ]
    return min(ratios) > _CLEARLY[max(n for n in _CLEARLY if n <= len(ratios))]
