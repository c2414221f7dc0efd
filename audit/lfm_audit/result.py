"""audit.json: what an audit is. reading.py reads it. Its JSON Schema, audit.schema.json, is made of its types.

Units are in the names: _ms, _s, _mib, _w, _j, _c (°C), _mhz, _tok_s; a share is of 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from lfm_runtime.formats.files import DIGEST, to_json, with_digest
from lfm_runtime.formats.manifest import Source
from lfm_runtime.formats.typed import as_json, schema_of
from lfm_runtime.setup.judged import judged_otherwise

from lfm_audit.figures import Figure

SCHEMA: Literal[3] = 3
TOOL = "lfm-edge audit"


@dataclass(frozen=True)
class Tool:
    """Name and version of the program that wrote the audit."""

    name: Literal["lfm-edge audit"]
    version: str


@dataclass(frozen=True)
class BundleFacts:
    """The bundle that was measured."""

    name: str
    source: Source | None
    licence: str | None
    fingerprint: Annotated[
        Mapping[str, str], "variant → tells its weights, and those of its prefill decoder, from others"
    ]


@dataclass(frozen=True)
class ProfileFacts:
    """The profile that was asked for, before stepping down."""

    name: str
    settings: Mapping[str, Any]
    budget: Mapping[str, Any]


@dataclass(frozen=True)
class ImageFacts:
    """An image that was asked about."""

    width: int
    height: int
    sha256: str


@dataclass(frozen=True)
class LeftOut:
    """An image that was skipped, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class WorkloadFacts:
    """The question, the images it was asked about and the images that were skipped."""

    question: str
    new_tokens: int
    skipped_images: tuple[LeftOut, ...]
    images: Mapping[str, ImageFacts]


@dataclass(frozen=True)
class Start:
    """From the start of a process until it is ready for a question."""

    ready_ms: Annotated[Figure, "from the start of the process until it is ready for a question"]
    python_ms: Annotated[Figure, "until the first line of ours"]
    import_ms: Figure
    open_ms: Annotated[Figure, "reading and checking what describes the bundle"]
    graphs_ms: Annotated[Mapping[str, Figure], "file → its load; they are loaded beside each other"]
    first_ttft_ms: Annotated[Figure, "the first answer of the process, about the first image"]


@dataclass(frozen=True)
class Starts:
    """By what was in the page cache. None: there was no such start in the time."""

    warm: Start
    cold: Annotated[Start | None, "the bundle's files not in the page cache"]
    first_ever: Annotated[
        Start | None, "neither those nor the libraries' in the page cache, modules compiled anew, nothing prepared"
    ]

    def items(self) -> Iterator[tuple[str, Start]]:
        """Yield (kind, start) for each kind of start that was measured."""
        for field in dataclasses.fields(self):
            if (start := getattr(self, field.name)) is not None:
                yield field.name, start


@dataclass(frozen=True)
class Stages:
    """Of one answer, in their order; they add up to the whole."""

    image_ms: Figure
    prompt_ms: Figure
    preprocess_ms: Figure
    load_ms: Annotated[Figure, "graphs that low_memory loads anew for every answer"]
    vision_ms: Figure
    embed_ms: Figure
    prefill_ms: Figure
    decode_ms: Figure
    detokenize_ms: Figure
    other_ms: Annotated[Figure, "the total less all of these"]

    def items(self) -> Iterator[tuple[str, Figure]]:
        """Yield (name, figure) for each stage, in their order."""
        for field in dataclasses.fields(self):
            yield field.name, getattr(self, field.name)


@dataclass(frozen=True)
class AnswerAt:
    """One answer in the course of the audit."""

    at_s: float
    ttft_ms: float
    inter_token_ms: Annotated[float | None, "mean of the answer"]


@dataclass(frozen=True)
class Answers:
    """Figures of all answers about one image."""

    prompt_tokens: int
    image_tokens: int
    views: int
    new_tokens: int
    first_ttft_ms: Annotated[Figure, "the first answer of a process; all others are of answers after it"]
    ttft_ms: Annotated[Figure, "from the question to the first token"]
    total_ms: Annotated[Figure, "from the question to the last token"]
    stages: Stages
    vision_per_view_ms: Figure | None
    inter_token_ms: Figure | None
    prefill_tok_s: Figure
    decode_tok_s: Figure | None
    energy_per_answer_j: Figure | None
    energy_per_token_j: Figure | None
    text_sha256: Annotated[tuple[str, ...], "of every different text said; more than one makes the audit invalid"]
    over_time: tuple[AnswerAt, ...]


@dataclass(frozen=True)
class StageMemory:
    """The largest memory seen in one stage."""

    anonymous_mib: float
    mapped_mib: float


@dataclass(frozen=True)
class MemoryAt:
    """One sample of a process's resident memory."""

    at_ms: float
    anonymous_mib: float
    mapped_mib: float


@dataclass(frozen=True)
class MemoryUse:
    """Of the processes. Mapped weights can be evicted and read again, what is anonymous cannot."""

    peak_mib: Annotated[Figure | None, "VmHWM: resident, mapped files included"]
    anonymous_mib: Annotated[Figure | None, "at the end; cannot be evicted"]
    mapped_mib: Annotated[Figure | None, "at the end; can be evicted and read again"]
    pss_mib: Figure | None
    swap_mib: Figure | None
    loaded_anonymous_mib: float | None
    loaded_mapped_mib: float | None
    gpu_mib: int | float | None
    gpu_reason: str | None
    per_stage: Annotated[Mapping[str, StageMemory], "largest seen in each stage"]
    timeline: Annotated[tuple[MemoryAt, ...], "of the last warm process, since its start"]


@dataclass(frozen=True)
class VariantResult:
    """All that was measured of one variant, and how it was run."""

    settings: Annotated[Mapping[str, Any], "of the profile, after stepping down"]
    steps_down: tuple[str, ...]
    first_ever_reason: Annotated[str | None, "why there is no first-ever start"]
    prefill: str | None
    threads: int
    prepared: bool
    disk_mib: Annotated[float, "graphs and weights, the prefill decoder's included"]
    quality: Annotated[Mapping[str, Any] | None, "as quantize measured it"]
    prepare_ms: float | None
    prepare_reason: Annotated[str | None, "why there is no prepare_ms"]
    starts: Starts
    images: Mapping[str, Answers]
    memory: MemoryUse
    warnings: tuple[str, ...]
    changes: Annotated[tuple[str, ...] | None, "of the checkpoint's image settings; null: not recorded"] = None

    @property
    def kl(self) -> float | None:
        """KL divergence from `kl_to` in nats a token, where quantize or quality measured it."""
        found = (self.quality or {}).get("kl")
        return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None

    @property
    def kl_to(self) -> str:
        """The variant that `kl` is the distance to."""
        return str((self.quality or {}).get("against", "fp32"))

    @property
    def kl_questions(self) -> int:
        """How many questions `kl` is the mean of; 0 where that is not known."""
        found = (self.quality or {}).get("questions")
        return found if isinstance(found, int) and not isinstance(found, bool) else 0

    @property
    def kl_error(self) -> float | None:
        """Standard error of `kl` over the questions."""
        found = (self.quality or {}).get("kl_error")
        return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None

    @property
    def kl_with(self) -> str:
        """How `kl` was measured, where that was not with this audit's prefill decoder and image settings: in words."""
        return judged_otherwise(self.quality or {}, self.prefill, self.changes)


@dataclass(frozen=True)
class MachineAt:
    """A sample of the machine's state."""

    at_s: float
    temperature_c: float | None
    frequency_mhz: float | None
    power_w: float | None
    throttled: bool
    available_mib: float


@dataclass(frozen=True)
class BackgroundAt:
    """What others used of all processors while one process was measured."""

    at_s: float
    until_s: float
    share: float


@dataclass(frozen=True)
class MachineResult:
    """The machine's state while all this was measured."""

    governor: str | None
    power_from: str | None
    missing: Annotated[Mapping[str, str], "sensor → why it is not there"]
    temperature_before_c: Mapping[str, float]
    temperature_after_c: Mapping[str, float]
    temperature_max_c: float | None
    throttle_bits_before: int | None
    throttle_bits_after: int | None
    throttled_while_measured: bool
    available_min_mib: Annotated[float, "the least MemAvailable seen"]
    swapped_mib: float
    background_share: Annotated[Figure, "of all processors, what others had while each process was measured"]
    idle_share: float
    idle_w: float | None
    mean_w: float | None
    peak_w: float | None
    control_group_peak_mib: Annotated[float | None, "of everything in this control group since it exists"]
    samples: tuple[MachineAt, ...]
    background: tuple[BackgroundAt, ...] = ()  # schema 1 had none


@dataclass(frozen=True)
class Minute:
    """Medians over the answers of one minute of a soak, and its highest temperature."""

    minute: int
    answers: int
    ttft_ms: float
    inter_token_ms: float | None
    temperature_c: float | None


@dataclass(frozen=True)
class Soak:
    """Answers without a pause. Changes are of the last minute against the first."""

    variant: str
    steady: bool
    minutes: tuple[Minute, ...]
    ttft_change: float
    inter_token_change: float


@dataclass(frozen=True)
class Limit:
    """A limit and what was measured. One that nothing measured does not hold."""

    name: str
    limit: float
    variant: str | None
    image: str | None
    measured: float | None
    holds: bool


@dataclass(frozen=True)
class Verdict:
    """Whether the measurement is to be trusted, and why not."""

    valid: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Headline:
    """A figure that an audit is quoted for."""

    variant: str
    image: str  # "" where it is not about one
    name: str  # of verdict.LIMITS
    figure: Figure


@dataclass(frozen=True)
class Audit:
    """One audit, with the fields of audit.json."""

    schema: Literal[1, 2, 3]  # 1 had no sha256, 2 no changes of the image settings
    tool: Tool
    created_unix_s: float
    duration_s: float
    partial: Annotated[bool, "ended before the time was over"]
    stopped: Annotated[str | None, "why"]
    bundle: BundleFacts
    device: Annotated[Mapping[str, Any], "as lfm-edge profile detect --json"]
    software: Mapping[str, str]
    profile: ProfileFacts
    workload: WorkloadFacts
    variants: Mapping[str, VariantResult]
    machine: MachineResult
    soak: Soak | None
    limits: tuple[Limit, ...]
    verdict: Verdict

    def headlines(self) -> Iterator[Headline]:
        """Starts and memory of each variant, then times and energy of each image."""
        for variant, found in self.variants.items():
            starts = {"ready_ms": found.starts.warm, "cold_ready_ms": found.starts.cold}
            kept = {"peak_rss_mib": found.memory.peak_mib, "anonymous_mib": found.memory.anonymous_mib}
            figures = {**{name: start.ready_ms for name, start in starts.items() if start}, **kept}
            yield from (Headline(variant, "", name, figure) for name, figure in figures.items() if figure)
            for image, answers in found.images.items():
                for name in ("ttft_ms", "total_ms", "decode_tok_s", "energy_per_answer_j"):
                    if (figure := getattr(answers, name)) is not None:
                        yield Headline(variant, image, name, figure)

    def to_text(self) -> str:
        """Return the text of audit.json; numbers are rounded to a ten-thousandth, those below 1 to four digits."""
        return to_json(with_digest(as_written(as_json(self))), indent=1) + "\n"


def audit_schema() -> dict[str, Any]:
    """Return the JSON Schema of audit.json."""
    said = "What a bundle cost on a machine. Units are in the names: _ms, _s, _mib, _w, _j, _c (°C), _mhz, _tok_s; a "
    said += "share is of 1. null: not measured, with the reason beside it or in machine.missing."
    schema = schema_of(Audit, TOOL, said)
    schema["properties"][DIGEST] = {"type": "string", "description": "of the other values, to tell edits and damage"}
    return schema


def as_written(value: Any) -> Any:
    """A value, or the values of lists and dicts, as precise as a file has it."""
    if isinstance(value, float):
        return round(value, 4) if abs(value) >= 1 else float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: as_written(v) for key, v in value.items()}
    return [as_written(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":  # python -m lfm_audit.result > audit/lfm_audit/audit.schema.json
    print(to_json(audit_schema(), indent=1))
