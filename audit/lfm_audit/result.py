"""What an audit's processes came to, as plain values: see audit.schema.json for what each means."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm_profiles.device import number
from lfm_profiles.sensors import Sensors
from lfm_runtime.bundle import Bundle
from lfm_runtime.report import WRITTEN

from lfm_audit.figures import figure
from lfm_audit.measure.power import Power
from lfm_audit.measure.trial import AnswerTimes, Outcome
from lfm_audit.measure.watch import Watch

STAGES = ("image", "prompt", "preprocess", "load", "vision", "embed", "prefill")
"""Of an answer, in their order; load: graphs that low_memory loads anew for every answer."""


@dataclass
class Run:
    """One process measured."""

    variant: str
    kind: str  # warm, cold, first_ever, soak
    outcome: Outcome
    watch: Watch


def variant_result(
    bundle: Bundle, variant: str, images: Sequence[str], runs: Sequence[Run], prepare: float | str, power: Power
) -> dict[str, Any]:
    """Everything about one variant. `images`: names in the order of the trials'; `prepare`: ms, or why none."""
    warm = [r for r in runs if r.kind == "warm"]
    outcome = warm[-1].outcome
    quality = bundle.manifest.quality.get(variant) if bundle.manifest else None
    files = [
        f
        for path in set(bundle.graphs(variant)[1].values())
        for f in (path, path.with_name(f"{path.name}_data"))
        if f.exists()
    ]
    return {
        "prefill": outcome.prefill,
        "threads": outcome.threads,
        "prepared": outcome.prepared,
        "disk_mib": sum(f.stat().st_size for f in files) / 2**20,
        "quality": quality,
        "prepare_ms": prepare if isinstance(prepare, float) else None,
        "prepare_reason": None if isinstance(prepare, float) else prepare,
        "starts": {kind: _start([r for r in runs if r.kind == kind]) for kind in ("warm", "cold", "first_ever")},
        "images": {name: _answers(at, warm, power) for at, name in enumerate(images)},
        "memory": _memory(warm),
        "warnings": sorted({warning for r in runs for warning in r.outcome.warnings}),
    }


def _start(runs: Sequence[Run]) -> dict[str, Any] | None:
    """From the start of a process until it can be asked. None: there was no such start in the time."""
    if not runs:
        return None
    found = [r.outcome for r in runs]
    return {
        "ready_ms": figure([o.ready_ms for o in found]),
        "python_ms": figure([o.python_ms for o in found]),
        "import_ms": figure([o.import_ms for o in found]),
        "open_ms": figure([o.open_ms for o in found]),
        "graphs_ms": {
            name: figure([o.graphs_ms[name] for o in found if name in o.graphs_ms])
            for name in sorted(found[0].graphs_ms)
        },
        "first_ttft_ms": figure([ttft(o.answers[0]) for o in found]),
    }


def _answers(at: int, runs: Sequence[Run], power: Power) -> dict[str, Any]:
    """Of one image: the first answer of each process apart from those after it."""
    all_of_it = [(run, a) for run in runs for a in run.outcome.answers if a.image == at]
    later = [(run, a) for run, a in all_of_it if a.repeat > 0]
    answers = [a for _, a in later]
    joules = [
        power.joules(run.watch.states, *(run.outcome.spawned + ms / 1e3 for ms in (a.started, a.ended)))
        for run, a in later
    ]
    measured = [j for j in joules if j is not None]
    one = answers[0]
    parts = {stage: [sum(a.of(stage)) for a in answers] for stage in STAGES}
    decode = [a.token_times[-1] - a.token_times[0] - sum(a.of(WRITTEN)[:-1]) for a in answers]
    written = [sum(a.of(WRITTEN)) for a in answers]
    known = [sum(values) for values in zip(*parts.values(), decode, written, strict=True)]
    return {
        "prompt_tokens": one.prompt_tokens,
        "image_tokens": one.image_tokens,
        "views": one.views,
        "new_tokens": one.new_tokens,
        "first_ttft_ms": figure([ttft(a) for _, a in all_of_it if a.repeat == 0]),
        "ttft_ms": figure([ttft(a) for a in answers]),
        "total_ms": figure([a.total_ms for a in answers]),
        "stages": {
            **{f"{stage}_ms": figure(values) for stage, values in parts.items()},
            "decode_ms": figure(decode),
            "detokenize_ms": figure(written),
            "other_ms": figure([a.total_ms - ms for a, ms in zip(answers, known, strict=True)]),
        },
        "vision_per_view_ms": figure([ms for a in answers for ms in a.of("vision")]) if one.views else None,
        "inter_token_ms": figure([ms for a in answers for ms in inter_token(a)]) if one.new_tokens > 1 else None,
        "prefill_tok_s": figure(
            [a.prompt_tokens / ms * 1e3 for a, ms in zip(answers, parts["prefill"], strict=True) if ms > 0] or [0.0]
        ),
        "decode_tok_s": figure([_decode_rate(a) for a in answers]) if one.new_tokens > 1 else None,
        "energy_per_answer_j": figure(measured) if measured else None,
        "energy_per_token_j": figure([j / one.new_tokens for j in measured]) if measured else None,
        "text_sha256": sorted({a.text_sha256 for _, a in all_of_it}),
        "over_time": [
            {
                "at_s": run.outcome.spawned + a.started / 1e3 - runs[0].outcome.spawned,
                "ttft_ms": ttft(a),
                "inter_token_ms": statistics.median(inter_token(a)) if one.new_tokens > 1 else None,
            }
            for run, a in all_of_it
        ],
    }


def ttft(answer: AnswerTimes) -> float:
    """From the question to the first token, ms."""
    return answer.token_times[0] - answer.started


def inter_token(answer: AnswerTimes) -> list[float]:
    """From each token to the next, ms."""
    times = answer.token_times
    return [b - a for a, b in itertools.pairwise(times)]


def _decode_rate(answer: AnswerTimes) -> float:
    """tok/s after the first token; 0 where the clock says that no time passed."""
    passed = answer.token_times[-1] - answer.token_times[0]
    return (answer.new_tokens - 1) / passed * 1e3 if passed > 0 else 0.0


def _memory(runs: Sequence[Run]) -> dict[str, Any]:
    """MiB, at the end of each process and while it worked. Mapped weights can be evicted and read again, what is
    anonymous cannot.
    """
    ends = [r.outcome.memory_mib for r in runs]

    def of(name: str) -> dict[str, Any] | None:
        values = [value for end in ends if (value := end.get(name)) is not None]
        return figure(values) if values else None

    last = runs[-1]
    gpu_mib = max((used for r in runs for used in r.watch.gpu_mib), default=None)
    begun = last.outcome.spawned
    timeline = [[(m.at - begun) * 1e3, m.anonymous, m.mapped] for m in last.watch.memory]
    per_stage: dict[str, dict[str, float]] = {}
    spans = [("load", 0.0, last.outcome.ready_ms), *(span for a in last.outcome.answers for span in a.spans)]
    for stage, begin, end in spans:
        inside = [(anonymous, mapped) for ms, anonymous, mapped in timeline if begin <= ms <= end]
        if inside:
            before = per_stage.get(stage, {"anonymous_mib": 0.0, "mapped_mib": 0.0})
            per_stage[stage] = {
                "anonymous_mib": max(before["anonymous_mib"], *(a for a, _ in inside)),
                "mapped_mib": max(before["mapped_mib"], *(m for _, m in inside)),
            }
    return {
        "peak_mib": of("peak") or of("rss"),
        "anonymous_mib": of("rss_anon"),
        "mapped_mib": of("rss_file"),
        "pss_mib": of("pss"),
        "swap_mib": of("swap"),
        "loaded_anonymous_mib": last.outcome.loaded_mib.get("rss_anon"),
        "loaded_mapped_mib": last.outcome.loaded_mib.get("rss_file"),
        "gpu_mib": gpu_mib,
        "gpu_reason": _why_no_gpu(last) if gpu_mib is None else None,
        "per_stage": per_stage,
        "timeline": [
            {"at_ms": ms, "anonymous_mib": anonymous, "mapped_mib": mapped} for ms, anonymous, mapped in timeline
        ],
    }


def _why_no_gpu(run: Run) -> str:
    if not run.watch.gpu:
        return "no GPU provider is used"
    return (
        "nvidia-smi tells nothing of this process: in a container it has another number, a Jetson's GPU has the "
        "machine's memory"
    )


def machine_result(
    idle: Watch, sensors: Sensors, runs: Sequence[Run], power: Power, no_meter: str | None
) -> dict[str, Any]:
    """The machine's state while all this was measured. `no_meter`: why the meter that was given is not used."""
    states = [*idle.states, *(state for run in runs for state in run.watch.states)]
    first, last = states[0], states[-1]
    before, after = first.reading, last.reading
    watts = power.watts(states)
    missing = {**sensors.missing, **({"meter": no_meter} if no_meter else {})}
    if power.meter:
        missing.pop("power", None)
    return {
        "governor": before.governor,
        "power_from": "a meter" if power.meter else sensors.power_from,
        "missing": missing,
        "temperature_before_c": dict(before.temperature_c),
        "temperature_after_c": dict(after.temperature_c),
        "temperature_max_c": max((t for s in states for t in s.reading.temperature_c.values()), default=None),
        "throttle_bits_before": before.throttle_bits,
        "throttle_bits_after": after.throttle_bits,
        "throttled_while_measured": any(s.reading.throttled_now for s in states),
        "available_min_mib": min(s.available_mib for s in states),
        "swapped_mib": runs[-1].watch.ended.swapped_mib - idle.begun.swapped_mib,
        "background_share": figure([_background(r) for r in runs]),
        "idle_share": _share(idle, 0.0),
        "idle_w": power.mean_w(idle.states),
        "mean_w": power.mean_w_of([r.watch.states for r in runs]),
        "peak_w": max(watts, default=None),
        "control_group_peak_mib": _control_group_peak(),
        "samples": [
            {
                "at_s": s.at - first.at,
                "temperature_c": max(s.reading.temperature_c.values(), default=None),
                "frequency_mhz": statistics.fmean(s.reading.frequency_mhz.values())
                if s.reading.frequency_mhz
                else None,
                "power_w": s.reading.power_w,
                "throttled": s.reading.throttled_now,
                "available_mib": s.available_mib,
            }
            for s in states
        ],
    }


def soak_result(outcome: Outcome, watch: Watch) -> dict[str, Any]:
    """Minute by minute, and what was lost against the first. A last minute that is not whole is left out where there
    are whole ones.
    """
    minutes: dict[int, list[AnswerTimes]] = {}
    for answer in outcome.answers:
        minutes.setdefault(int((answer.started - outcome.ready_ms) / 60_000), []).append(answer)
    if len(minutes) > 1:
        minutes.pop(max(minutes))
    rows = []
    for minute, answers in sorted(minutes.items()):
        begin = outcome.spawned + outcome.ready_ms / 1e3 + minute * 60
        warm = [t for s in watch.states if begin <= s.at <= begin + 60 for t in s.reading.temperature_c.values()]
        between = [ms for a in answers for ms in inter_token(a)]
        rows.append(
            {
                "minute": minute,
                "answers": len(answers),
                "ttft_ms": statistics.median(ttft(a) for a in answers),
                "inter_token_ms": statistics.median(between) if between else None,
                "temperature_c": max(warm, default=None),
            }
        )
    first, last = rows[0], rows[-1]
    return {
        "variant": outcome.variant,
        "steady": outcome.steady,
        "minutes": rows,
        "ttft_change": _change(first["ttft_ms"], last["ttft_ms"]),
        "inter_token_change": _change(first["inter_token_ms"], last["inter_token_ms"]),
    }


def _change(before: Any, after: Any) -> float:
    return float(after / before - 1) if before else 0.0


def _background(run: Run) -> float:
    return _share(run.watch, run.outcome.cpu_s)


def _share(watch: Watch, own_s: float) -> float:
    """Of all processors, what others had: programs, and the host of a virtual machine."""
    busy, passed = watch.ended.busy_s - watch.begun.busy_s, watch.ended.at - watch.begun.at
    return max(0.0, (busy - own_s) / (passed * (os.cpu_count() or 1)))


def _control_group_peak() -> float | None:
    """Of everything in this process's control group, since it exists."""
    places = (Path("/sys/fs/cgroup/memory.peak"), Path("/sys/fs/cgroup/memory/memory.max_usage_in_bytes"))
    found = [peak for path in places if (peak := number(path)) is not None]
    return found[0] / 2**20 if found else None


def plain(value: Any) -> Any:
    """For JSON: numbers rounded to a ten-thousandth, tuples as lists."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value
