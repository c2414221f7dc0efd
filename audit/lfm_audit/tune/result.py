"""The JSON that `lfm-edge tune` keeps beside a profile: every point measured, the Pareto front, the chosen point."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.files import check_digest, read_json_object, to_json, with_digest
from lfm_runtime.formats.typed import as_json, read_as

TOOL = "lfm-edge tune"

Settings = Mapping[str, Any]
"""A point's settings by axis."""


@dataclass(frozen=True)
class PointResult:
    """One point: its settings, and samples keyed by round."""

    settings: Settings
    latency_ms: Mapping[str, float]  # of an answer, its model loaded; empty: not measured
    ttft_ms: Mapping[str, float]
    peak_mib: float
    anonymous_mib: float
    energy_j: Mapping[str, float]  # of an answer
    kl: float | None  # nats a token, against the reference
    failed: str | None

    @property
    def ms(self) -> float:
        """Median latency of an answer."""
        return statistics.median(self.latency_ms.values())


@dataclass(frozen=True)
class Key:
    """What measurements must have in common to be of one search."""

    bundle: tuple[Any, ...]  # fingerprints of its graphs
    onnxruntime: str
    machine: str  # as uname -m
    cpu_features: tuple[str, ...]
    images: tuple[str, ...]
    question: str


@dataclass(frozen=True)
class TuningResult:
    """A search, as it is kept on disk."""

    tool: Literal["lfm-edge tune"]
    version: str
    key: Key
    objective: Literal["latency", "memory", "energy"]
    floor_kl: float
    rounds: int
    reference: str
    profile: str
    front: tuple[Settings, ...]
    chosen: Settings
    points: tuple[PointResult, ...]
    bundle: str = ""
    machine: str = ""
    created_unix_s: float = 0.0
    why: str = ""  # the chosen point was chosen

    @property
    def measured(self) -> list[PointResult]:
        """Points with at least one sample."""
        return [point for point in self.points if point.latency_ms]

    def point(self, settings: Settings) -> PointResult:
        """Return the measured point with these settings.

        Raises:
            StopIteration: there is none; `read` refuses such files.
        """
        return next(point for point in self.measured if point.settings == settings)

    @staticmethod
    def read(path: Path, error: type[EdgeError], advice: str) -> TuningResult | None:
        """Read a file; None where it was not written by lfm-edge tune.

        Raises:
            error: it is not JSON, or damaged: where, and what stands there.
        """
        raw = read_json_object(path, error, advice=advice)
        if raw.get("tool") != TOOL:
            return None
        check_digest(raw, path, error, advice)
        found = read_as(TuningResult, raw, path, error, advice)
        axes = found.chosen.keys()
        for point in found.points:
            if any(value <= 0 for value in point.latency_ms.values()) or point.settings.keys() != axes:
                raise error(f"{path}: a point has impossible latencies or other settings than the others; {advice}")
            if not all(key.isdecimal() for key in (*point.latency_ms, *point.ttft_ms, *point.energy_j)):
                raise error(f"{path}: a round is not a number; {advice}")
        there = [point.settings for point in found.measured]
        if not found.front or any(settings not in there for settings in (found.chosen, *found.front)):
            raise error(f"{path} was edited: a point of the front is not among those measured; {advice}")
        return found

    def to_text(self) -> str:
        """Return the text of the file."""
        return to_json(with_digest(as_json(self)), indent=1) + "\n"


def is_tuning(path: Path) -> bool:
    """Whether lfm-edge tune wrote this file; raises EdgeError where it is not JSON."""
    return read_json_object(path, EdgeError).get("tool") == TOOL
