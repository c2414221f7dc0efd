"""Makes an audit of the processes that were measured."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import PIL
import psutil
from lfm_profiles import Device, Profile
from lfm_profiles.device import number
from lfm_profiles.schema import SETTINGS
from lfm_profiles.sensors import Sensors
from lfm_runtime import __version__
from lfm_runtime.formats.manifest import file_hash
from lfm_runtime.formats.onnx_file import external_files
from lfm_runtime.images.pixels import image_size
from lfm_runtime.report import WRITTEN
from lfm_runtime.setup.costs import fingerprint
from lfm_runtime.setup.profile import departures

from lfm_audit.figures import Figure
from lfm_audit.measure.power import Power
from lfm_audit.measure.trial import AnswerTimes, Outcome
from lfm_audit.measure.watch import Watch
from lfm_audit.result import (
    SCHEMA,
    AnswerAt,
    Answers,
    Audit,
    BackgroundAt,
    BundleFacts,
    ImageFacts,
    LeftOut,
    MachineAt,
    MachineResult,
    MemoryAt,
    MemoryUse,
    Minute,
    ProfileFacts,
    Soak,
    StageMemory,
    Stages,
    Start,
    Starts,
    Tool,
    VariantResult,
    Verdict,
    WorkloadFacts,
)
from lfm_audit.workload import Subject, Workload

STAGES = ("image", "prompt", "preprocess", "load", "vision", "embed", "prefill")
"""Of an answer, in their order; load: graphs that low_memory loads anew for every answer."""


@dataclass
class Run:
    """One measured process: its outcome, and what was watched meanwhile."""

    variant: str
    kind: str  # warm, cold, first_ever, soak
    outcome: Outcome
    watch: Watch


@dataclass(frozen=True)
class Measured:
    """All that was measured, before anything is judged."""

    work: Workload
    device: Device
    sensors: Sensors
    begun_unix: float
    duration_s: float
    stopped: str | None  # why it ended before the time was over
    idle: Watch
    runs: Sequence[Run]
    soak: Run | None
    prepare_ms: Mapping[str, float | str]  # or the reason why not
    power: Power
    no_meter: str | None  # why the meter that was given is not used


def summary(measured: Measured) -> Audit:
    """As an audit that is not judged yet: without limits, and valid."""
    work, runs = measured.work, measured.runs
    all_runs = [*runs, *([measured.soak] if measured.soak else [])]
    return Audit(
        SCHEMA,
        Tool("lfm-edge audit", __version__),
        round(measured.begun_unix, 3),
        measured.duration_s,
        measured.stopped is not None,
        measured.stopped,
        _bundle(measured),
        measured.device.as_dict(),
        {
            "python": platform.python_version(),
            "onnxruntime": ort.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "psutil": psutil.__version__,
            "kernel": platform.release(),
        },
        ProfileFacts(work.profile.name, _settings(work.profile), asdict(work.profile.budget)),
        WorkloadFacts(
            work.question,
            work.new_tokens,
            tuple(LeftOut(**image) for image in work.skipped),
            {name: ImageFacts(*image_size(path), file_hash(path)) for name, path in work.images.items()},
        ),
        {
            subject.variant: _variant(measured, subject)
            for subject in work.subjects
            if any(r.variant == subject.variant and r.kind == "warm" for r in runs)
        },
        _machine(measured, all_runs),
        _soak(measured.soak.outcome, measured.soak.watch) if measured.soak else None,
        (),
        Verdict(valid=True, reasons=()),
    )


def _bundle(measured: Measured) -> BundleFacts:
    bundle = measured.work.bundle
    source = bundle.manifest.source if bundle.manifest else None
    prefill = {run.variant: run.outcome.prefill for run in measured.runs}
    prints = {variant: fingerprint(bundle, variant, other) for variant, other in prefill.items()}
    return BundleFacts(bundle.folder.resolve().name, source, source.license if source else None, prints)


def _settings(profile: Profile) -> dict[str, Any]:
    return {name: getattr(profile, name) for name in SETTINGS}


def _variant(measured: Measured, subject: Subject) -> VariantResult:
    bundle, variant = measured.work.bundle, subject.variant
    runs = [r for r in measured.runs if r.variant == variant]
    warm, cold, first = ([r for r in runs if r.kind == kind] for kind in ("warm", "cold", "first_ever"))
    outcome = warm[-1].outcome
    prepare = measured.prepare_ms.get(variant, "the audit ended before")
    graphs = bundle.graphs_read(variant, outcome.prefill)
    files = {path for graph in graphs for path in (graph, *(graph.parent / name for name in external_files(graph)))}
    return VariantResult(
        _settings(subject.profile),
        subject.steps,
        subject.too_large,
        outcome.prefill,
        outcome.threads,
        outcome.prepared,
        sum(f.stat().st_size for f in files) / 2**20,
        bundle.manifest.quality.get(variant) if bundle.manifest else None,
        prepare if isinstance(prepare, float) else None,
        None if isinstance(prepare, float) else prepare,
        Starts(_start(warm), _start(cold) if cold else None, _start(first) if first else None),
        {name: _answers(at, warm, measured) for at, name in enumerate(measured.work.images)},
        _memory(warm),
        tuple(sorted({warning for r in runs for warning in r.outcome.warnings})),
        tuple(departures(subject.profile, bundle.images)),
    )


def _start(runs: Sequence[Run]) -> Start:
    found = [r.outcome for r in runs]
    graphs = {
        name: Figure.of([o.graphs_ms[name] for o in found if name in o.graphs_ms])
        for name in sorted(found[0].graphs_ms)
    }
    return Start(
        Figure.of([o.ready_ms for o in found]),
        Figure.of([o.python_ms for o in found]),
        Figure.of([o.import_ms for o in found]),
        Figure.of([o.open_ms for o in found]),
        graphs,
        Figure.of([ttft(o.answers[0]) for o in found]),
    )


def _answers(at: int, runs: Sequence[Run], measured: Measured) -> Answers:
    """Of one image: the first answer of each process apart from those after it."""
    power, begun = measured.power, measured.idle.states[0].at
    all_of_it = [(run, a) for run in runs for a in run.outcome.answers if a.image == at]
    later = [(run, a) for run, a in all_of_it if a.repeat > 0]
    answers = [a for _, a in later]
    joules = [
        power.joules(run.watch.states, *(run.outcome.spawned + ms / 1e3 for ms in (a.started, a.ended)))
        for run, a in later
    ]
    energy = [j for j in joules if j is not None]
    one = answers[0]
    decodes = one.new_tokens > 1
    prefill = [a.prompt_tokens / ms * 1e3 for a in answers if (ms := sum(a.stage_ms("prefill"))) > 0]
    return Answers(
        one.prompt_tokens,
        one.image_tokens,
        one.views,
        one.new_tokens,
        Figure.of([ttft(a) for _, a in all_of_it if a.repeat == 0]),
        Figure.of([ttft(a) for a in answers]),
        Figure.of([a.total_ms for a in answers]),
        _stages(answers),
        Figure.of([ms for a in answers for ms in a.stage_ms("vision")]) if one.views else None,
        Figure.of([ms for a in answers for ms in inter_token(a)]) if decodes else None,
        Figure.of(prefill or [0.0]),
        Figure.of([decode_rate(a) for a in answers]) if decodes else None,
        Figure.of(energy) if energy else None,
        Figure.of([j / one.new_tokens for j in energy]) if energy else None,
        tuple(sorted({a.text_sha256 for _, a in all_of_it})),
        tuple(AnswerAt(run.outcome.spawned + a.started / 1e3 - begun, ttft(a), ms_a_token(a)) for run, a in all_of_it),
    )


def _stages(answers: Sequence[AnswerTimes]) -> Stages:
    parts = [[sum(a.stage_ms(stage)) for a in answers] for stage in STAGES]
    decode = [a.token_times[-1] - a.token_times[0] - sum(a.stage_ms(WRITTEN)[:-1]) for a in answers]
    written = [sum(a.stage_ms(WRITTEN)) for a in answers]
    known = [sum(values) for values in zip(*parts, decode, written, strict=True)]
    other = [a.total_ms - ms for a, ms in zip(answers, known, strict=True)]
    return Stages(*(Figure.of(values) for values in (*parts, decode, written, other)))


def ttft(answer: AnswerTimes) -> float:
    """Return the time from the question to the first token, in ms."""
    return answer.token_times[0] - answer.started


def inter_token(answer: AnswerTimes) -> list[float]:
    """Return the time from each token to the next, in ms."""
    times = answer.token_times
    return [b - a for a, b in itertools.pairwise(times)]


def ms_a_token(answer: AnswerTimes) -> float | None:
    """Return the mean time from a token to the next, pauses included; None for an answer of one token."""
    steps = inter_token(answer)
    return statistics.fmean(steps) if steps else None


def decode_rate(answer: AnswerTimes) -> float:
    """tok/s after the first token; 0 where the clock says that no time passed."""
    passed = answer.token_times[-1] - answer.token_times[0]
    return (answer.new_tokens - 1) / passed * 1e3 if passed > 0 else 0.0


def _memory(runs: Sequence[Run]) -> MemoryUse:
    """MiB, at the end of each process and while it worked."""
    ends = [r.outcome.memory_mib for r in runs]

    def of(name: str) -> Figure | None:
        values = [value for end in ends if (value := end.get(name)) is not None]
        return Figure.of(values) if values else None

    last = runs[-1]
    gpu_mib = max((used for r in runs for used in r.watch.gpu_mib), default=None)
    begun = last.outcome.spawned
    timeline = tuple(MemoryAt((m.at - begun) * 1e3, m.anonymous, m.mapped) for m in last.watch.memory)
    return MemoryUse(
        of("peak") or of("rss"),
        of("rss_anon"),
        of("rss_file"),
        of("pss"),
        of("swap"),
        last.outcome.loaded_mib.get("rss_anon"),
        last.outcome.loaded_mib.get("rss_file"),
        gpu_mib,
        _why_no_gpu(last) if gpu_mib is None else None,
        _per_stage(last.outcome, timeline),
        timeline,
    )


def _per_stage(outcome: Outcome, timeline: Sequence[MemoryAt]) -> dict[str, StageMemory]:
    found: dict[str, StageMemory] = {}
    for stage, begin, end in [("load", 0.0, outcome.ready_ms), *(span for a in outcome.answers for span in a.spans)]:
        inside = [m for m in timeline if begin <= m.at_ms <= end]
        if inside:
            before = found.get(stage, StageMemory(0.0, 0.0))
            found[stage] = StageMemory(
                max(before.anonymous_mib, *(m.anonymous_mib for m in inside)),
                max(before.mapped_mib, *(m.mapped_mib for m in inside)),
            )
    return found


def _why_no_gpu(run: Run) -> str:
    if not run.watch.gpu:
        return "no GPU provider is used"
    why = "in a container the process has another number; on a Jetson the GPU uses the machine's memory"
    return f"nvidia-smi does not list this process: {why}"


def _machine(measured: Measured, runs: Sequence[Run]) -> MachineResult:
    idle, sensors, power = measured.idle, measured.sensors, measured.power
    states = [*idle.states, *(state for run in runs for state in run.watch.states)]
    first, last = states[0], states[-1]
    before, after = first.reading, last.reading
    missing = {**sensors.missing, **({"meter": measured.no_meter} if measured.no_meter else {})}
    if power.meter:
        missing.pop("power", None)
    return MachineResult(
        governor=before.governor,
        power_from="a meter" if power.meter else sensors.power_from,
        missing=missing,
        temperature_before_c=dict(before.temperature_c),
        temperature_after_c=dict(after.temperature_c),
        temperature_max_c=max((t for s in states for t in s.reading.temperature_c.values()), default=None),
        throttle_bits_before=before.throttle_bits,
        throttle_bits_after=after.throttle_bits,
        throttled_while_measured=any(s.reading.throttled_now for s in states),
        available_min_mib=min(s.available_mib for s in states),
        swapped_mib=runs[-1].watch.ended.swapped_mib - idle.begun.swapped_mib,
        background_share=Figure.of([_background(r) for r in runs]),
        idle_share=_share(idle, 0.0),
        idle_w=power.mean_w(idle.states),
        mean_w=power.mean_w_of([r.watch.states for r in runs]),
        peak_w=max(power.watts(states), default=None),
        control_group_peak_mib=_control_group_peak(),
        samples=tuple(
            MachineAt(
                s.at - first.at,
                max(s.reading.temperature_c.values(), default=None),
                statistics.fmean(s.reading.frequency_mhz.values()) if s.reading.frequency_mhz else None,
                s.reading.power_w,
                bool(s.reading.throttled_now),
                s.available_mib,
            )
            for s in states
        ),
        background=tuple(
            BackgroundAt(run.watch.begun.at - first.at, run.watch.ended.at - first.at, _background(run)) for run in runs
        ),
    )


def _soak(outcome: Outcome, watch: Watch) -> Soak:
    """Minute by minute. A last minute that is not whole is left out where there are whole ones."""
    minutes: dict[int, list[AnswerTimes]] = {}
    for answer in outcome.answers:
        minutes.setdefault(int((answer.started - outcome.ready_ms) / 60_000), []).append(answer)
    if len(minutes) > 1:
        minutes.pop(max(minutes))
    rows = []
    for minute, answers in sorted(minutes.items()):
        begin = outcome.spawned + outcome.ready_ms / 1e3 + minute * 60
        warm = [t for s in watch.states if begin <= s.at <= begin + 60 for t in s.reading.temperature_c.values()]
        each_answer = [ms for a in answers if (ms := ms_a_token(a)) is not None]
        ttft_ms = statistics.median(ttft(a) for a in answers)
        each = statistics.median(each_answer) if each_answer else None
        rows.append(Minute(minute, len(answers), ttft_ms, each, max(warm, default=None)))
    first, last = rows[0], rows[-1]
    return Soak(
        outcome.variant,
        outcome.steady,
        tuple(rows),
        _change(first.ttft_ms, last.ttft_ms),
        _change(first.inter_token_ms, last.inter_token_ms),
    )


def _change(before: Any, after: Any) -> float:
    return float(after / before - 1) if before else 0.0


def _background(run: Run) -> float:
    return _share(run.watch, run.outcome.cpu_s)


def _share(watch: Watch, own_s: float) -> float:
    """Of all processors, what others had: programs, and the host of a virtual machine."""
    busy, passed = watch.ended.busy_s - watch.begun.busy_s, watch.ended.at - watch.begun.at
    return max(0.0, (busy - own_s) / (passed * (os.cpu_count() or 1)))


def _control_group_peak() -> float | None:
    """Return the peak memory of this process's control group since it exists, in MiB; None where unknown."""
    places = (Path("/sys/fs/cgroup/memory.peak"), Path("/sys/fs/cgroup/memory/memory.max_usage_in_bytes"))
    found = [peak for path in places if (peak := number(path)) is not None]
    return found[0] / 2**20 if found else None
