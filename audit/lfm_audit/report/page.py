"""The page: one HTML file with everything in it, for a browser without network and for print."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from lfm_runtime.errors import counted

from lfm_audit.report import plots
from lfm_audit.report.fleet import boards_table, kinds
from lfm_audit.report.source import MARK, Named, Series, all_series, changes_title
from lfm_audit.report.tables import (
    Table,
    answers_table,
    changes_table,
    figures_table,
    limits_table,
    machine_table,
    settings_table,
    tuning_tables,
    variants_table,
)
from lfm_audit.result import Audit, VariantResult
from lfm_audit.table import left_out, verdict_line
from lfm_audit.tune.result import TuningResult
from lfm_audit.verdict import grouped

_MOST_SERIES, _MOST_NAMES = 8, 6
_BOARDS = (
    "Medians, of the first variant and the largest image. A board is unlike the others where the 95 % interval of a "
    "figure is worse than the others' median, by more than 5 % and three times what they differ by; where it was "
    "throttled; or where its versions, settings or weights are not those of most."
)
_KL = (
    "KL divergence as the bundle knew it, on images that did not calibrate: measured when the variant was quantized, "
    "or by lfm-edge quality over more questions. Its ± is the standard error over questions."
)


@dataclass(frozen=True)
class Section:
    """A part of the page: plots and tables below a title and a note. `folded`: it is opened by a click."""

    title: str
    parts: Sequence[Any]
    note: str = ""
    folded: bool = False


def audit_page(audits: Sequence[Named]) -> str:
    """Boards that are unlike the others of their kind, the sentence, verdicts and costs first, then where time and
    memory go; details are folded.
    """
    series, several = all_series(audits), len(audits) > 1
    boards = [Section(title, [boards_table(of_kind)], _BOARDS) for title, of_kind in kinds(audits)]
    sections = _sections(audits, series)
    if len(series) > _MOST_SERIES:  # such a page is about the boards: plots of all of them are opened by a click
        sections = [replace(section, folded=True) for section in sections]
    notes = [f"{named.name}: {note}" if several else note for named in audits for note in _notes(named.audit)]
    if any(one.result.kl is not None for one in series) and not plots.comparable_losses(series):
        needed = "two variants whose losses to the same one were measured as they ran"
        notes.append(f"no plot of quality and cost: it needs {needed}")
    verdicts = [{**_verdict(named), "name": named.name if several else ""} for named in audits]
    if len(audits) > _MOST_NAMES:
        verdicts = [verdict for verdict in verdicts if not verdict["good"]]
    return _render(_title(audits), verdicts, [*boards, *sections], notes)


def _title(audits: Sequence[Named]) -> str:
    if len(audits) == 1:
        return title_of(audits[0])
    names = ", ".join(named.name for named in audits) if len(audits) <= _MOST_NAMES else _places(audits)
    return f"{len(audits)} audits: {names}"


def _sections(audits: Sequence[Named], series: Sequence[Series]) -> list[Section]:
    return [
        Section(
            "What it costs",
            [answers_table(series), variants_table(series)],
            "Medians; the peak is the largest. ± is the median absolute deviation: half of the answers are within it. "
            "The first answer of each process is left out."
            + (f" {_KL}" if any(one.result.kl for one in series) else "")
            + (
                " Where the prefill decoder or image settings were others than here, that is said; measured as here: "
                "lfm-edge quality --profile."
                if any(one.result.kl and one.result.kl_with for one in series)
                else ""
            ),
        ),
        Section("Limits", [limits_table(audits)]),
        Section(
            changes_title(audits),
            [changes_table(audits)],
            "Medians, of the peak too. Within noise: their 95 % intervals overlap."
            + (" Bold: worse by more than 5 %." if len(audits) > 1 else ""),
        ),
        Section(
            "Where the time of an answer goes",
            [plots.waterfall(series)],
            "The answer whose total is the median, for each image. One scale for all.",
        ),
        Section(
            "Time until ready",
            [plots.starts(series)],
            "Warm: files in the page cache. Cold: the bundle's are not. First-ever: neither are the libraries, and "
            "nothing is prepared." + _missing_starts(series),
        ),
        Section(
            "Memory",
            [plots.memory(series)],
            "One process: load, then every image twice. Mapped files can be evicted and read again; anonymous memory "
            "cannot. The peak is the largest of all processes.",
        ),
        Section(
            "Evenness", [plots.over_time(audits, series)], "Each point is an answer: a step is a change of the machine."
        ),
        Section("The machine during the audit", [plots.machine(audits), machine_table(audits)]),
        Section("Soak", [plots.soak(audits)]),
        Section("Quality and cost", [plots.quality(series)], _KL),
        Section(
            "Every figure",
            [figures_table(series)],
            "MAD: median absolute deviation. 95 %: the median's confidence interval.",
            folded=True,
        ),
        Section("Settings", [settings_table(audits)]),
    ]


def _places(audits: Sequence[Named]) -> str:
    """How many boards of which model: `20 × Raspberry Pi 5, 2 × Jetson Orin Nano`."""
    return ", ".join(f"{times} × {where}" for where, times in Counter(a.where for a in audits).most_common())


def title_of(named: Named) -> str:
    """Model, variants, machine and day: what tells one page of a fleet from another."""
    audit, day = named.audit, named.when.partition(" ")[0]
    return f"{named.model} {', '.join(audit.variants)} · {named.where} · {day}"


def _verdict(named: Named) -> dict[str, Any]:
    """What stands above the fold: the verdict, and a sentence for each variant."""
    audit = named.audit
    broken = sum(not limit.holds for limit in audit.limits)
    return {
        "good": audit.verdict.valid and not broken,
        "word": "Valid" if audit.verdict.valid else "Not valid",
        "limits": f", {len(audit.limits) - broken} of {len(audit.limits)} limits hold" if audit.limits else "",
        "reasons": grouped(audit.verdict.reasons),
        "sentences": [_sentence(variant, found, named) for variant, found in audit.variants.items()],
        "line": f"{verdict_line(audit).partition(': ')[2]} · {named.when}",
    }


def _sentence(variant: str, found: VariantResult, named: Named) -> str:
    """What a variant costs here, about the largest image."""
    sizes = named.audit.workload.images
    name = max(found.images, key=lambda image: sizes[image].width * sizes[image].height if image in sizes else 0)
    answers, size = found.images[name], sizes.get(name)
    pixels = f"{size.width}×{size.height} pixels" if size else name
    rate = f", then {answers.decode_tok_s.median:,.1f} tokens a second" if answers.decode_tok_s else ""
    peak = f"; {found.memory.peak_mib.max:,.0f} MiB at the peak" if found.memory.peak_mib else ""
    first = answers.ttft_ms.median
    after = f"{first / 1e3:.2f} s" if first >= 100 else f"{first:.0f} ms"
    return f"{named.model}, {variant}, on {named.where}: first token {after} after an image of {pixels}{rate}{peak}."


def _missing_starts(series: Sequence[Series]) -> str:
    missing = []
    for one in series:
        starts = one.result.starts
        if starts.cold is None:
            missing.append(f"{one.label} has no cold start: the time was over; raise --budget")
        if starts.first_ever is None:
            why = one.result.first_ever_reason or "the time was over; raise --budget"
            missing.append(f"{one.label} has no first-ever start: {why}")
    return f" {'. '.join(missing)}." if missing else ""


def _notes(audit: Audit) -> Iterator[str]:
    yield from left_out(audit)
    for variant, found in audit.variants.items():
        yield from (f"{variant}: to fit the memory: {step}" for step in found.steps_down)
        yield from (f"{variant}: {warning}" for warning in found.warnings)
    yield from (f"no {sensor}: {why}" for sensor, why in audit.machine.missing.items())


def tuning_page(tuning: TuningResult) -> str:
    """Return a tuning as an HTML page: the chosen settings, all points measured, the front."""
    front, settings = tuning_tables(tuning)
    images = [Path(name).name for name in tuning.key.images]
    day = time.strftime("%Y-%m-%d", time.gmtime(tuning.created_unix_s)) if tuning.created_unix_s else ""
    title = " · ".join(part for part in (f"Tuned for {tuning.objective}", tuning.bundle, tuning.machine, day) if part)
    asked = f"{', '.join(images)}: {tuning.key.question}"
    sections = [
        Section("Chosen", [settings], f"{tuning.why[:1].upper()}{tuning.why[1:]}." if tuning.why else ""),
        Section(
            "All points",
            [plots.pareto(tuning)],
            f"{counted(len(tuning.measured), 'point')}, {counted(tuning.rounds, 'round')}. Numbers are rows of the "
            f"front. KL: against {tuning.reference} with the checkpoint's own image settings. Asked: {asked}",
        ),
        Section(
            "The front",
            [front],
            "The Pareto front: no other point is faster beyond chance, takes no more memory and loses no more quality.",
        ),
    ]
    notes = sorted({p.failed for p in tuning.points if p.failed})
    return _render(title, [], sections, notes)


def _render(
    title: str, verdicts: Sequence[Mapping[str, Any]], sections: Sequence[Section], notes: Sequence[str]
) -> str:
    templates = jinja2.PackageLoader("lfm_audit.report", "")
    environment = jinja2.Environment(
        loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    shown = [
        {
            "title": section.title,
            "note": section.note,
            "folded": section.folded,
            "parts": [{"table": part} if isinstance(part, Table) else {"svg": part} for part in section.parts if part],
        }
        for section in sections
    ]
    shown = [section for section in shown if section["parts"]]
    return environment.get_template("page.html.jinja").render(
        title=title, verdicts=verdicts, sections=shown, notes=notes, mark=MARK
    )
