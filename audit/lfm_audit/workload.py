"""What an audit measures: which variants of a bundle, asked what, for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lfm_profiles import Profile
from lfm_runtime.bundle import Bundle

QUESTION = "Describe this image."
SHORTEST_SOAK, LONGEST_SOAK = 2, 100_000  # minutes


@dataclass(frozen=True)
class Subject:
    """One variant to measure, and how it is run."""

    variant: str
    profile: Profile  # how it is run, after stepping down to what fits the memory
    steps: tuple[str, ...] = ()  # what was given up for that
    too_large: str | None = None  # why the unprepared, first-ever start is left out


@dataclass(frozen=True)
class Workload:
    """What an audit measures: question, images, variants, time and limits."""

    bundle: Bundle
    profile: Profile
    subjects: Sequence[Subject]
    images: Mapping[str, Path]
    skipped: Sequence[Mapping[str, str]] = ()
    question: str = QUESTION
    new_tokens: int = 32
    budget_s: float = 180.0
    soak_minutes: float = 0.0
    limits: Mapping[str, float] = field(default_factory=dict)
    meter: Path | None = None  # a power meter's CSV, read when all is measured
