"""The page: one HTML file with everything in it, for a browser without network and for print."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from lfm_audit.report import plots
from lfm_audit.report.source import MARK, Named, all_series
from lfm_audit.report.tables import (
    Table,
    changes_table,
    figures_table,
    headline_table,
    limits_table,
    machine_table,
    settings_table,
    tuning_tables,
)
from lfm_audit.result import Audit
from lfm_audit.table import verdict_line
from lfm_audit.tune.result import TuningResult
from lfm_audit.verdict import grouped

Section = tuple[str, list[Any], str]
"""Title, plots and tables, a note below the title."""


def audit_page(audits: Sequence[Named]) -> str:
    """Verdicts and headlines first, then where time and memory go, then everything else."""
    series = all_series(audits)
    sections: list[Section] = [
        ("What it costs", [headline_table(series)], ""),
        ("Limits", [limits_table(audits)], ""),
        ("What changed", [changes_table(audits)], "Within noise: the medians' 95 % intervals overlap."),
        (
            "Where the time of an answer goes",
            [plots.waterfall(series)],
            "Medians; the first answer of each process is left out.",
        ),
        (
            "Time until ready",
            [plots.starts(series)],
            "Warm: files in the page cache. Cold: the bundle's are not. First-ever: neither "
            "are the libraries, and nothing is prepared.",
        ),
        (
            "Memory",
            [plots.memory(series)],
            "One process: load, then every image twice. Mapped files can be evicted and read again; "
            "anonymous memory cannot.",
        ),
        ("Evenness", [plots.over_time(audits, series)], "Each point is an answer; red: throttled."),
        ("The machine during the audit", [plots.machine(audits), machine_table(audits)], ""),
        ("Soak", [plots.soak(audits)], ""),
        (
            "Quality and cost",
            [plots.quality(series)],
            "As measured when the variant was quantized, on images calibration did not see.",
        ),
        (
            "Every figure",
            [figures_table(series)],
            "MAD: median absolute deviation. 95 %: the median's confidence interval.",
        ),
        ("Settings", [settings_table(audits)], ""),
    ]
    notes = [f"{named.name}: {note}" for named in audits for note in _notes(named.audit)]
    verdicts = [
        {
            "name": named.name,
            "valid": named.audit.verdict.valid,
            "reasons": grouped(named.audit.verdict.reasons),
            "broken": sum(not limit.holds for limit in named.audit.limits),
            "limits": len(named.audit.limits),
            "line": verdict_line(named.audit).partition(": ")[2],
            "where": named.where,
            "when": named.when,
        }
        for named in audits
    ]
    one = f"{audits[0].audit.bundle.name} on {audits[0].where}"
    title = one if len(audits) == 1 else f"{len(audits)} audits"
    return _render(title, verdicts, sections, notes)


def _notes(audit: Audit) -> Iterator[str]:
    for image in audit.workload.skipped_images:
        yield f"left out: {image.name}: {image.reason}"
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
    sections: list[Section] = [
        ("Chosen", [settings], f"{tuning.why[:1].upper()}{tuning.why[1:]}." if tuning.why else ""),
        (
            "All points",
            [plots.pareto(tuning)],
            f"{len(tuning.measured)} points, {tuning.rounds} rounds. Numbers are rows of the front. "
            f"KL: against {tuning.reference} with the checkpoint's own image settings. Asked: {asked}",
        ),
        (
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
            "title": name,
            "note": note,
            "parts": [{"table": part} if isinstance(part, Table) else {"svg": part} for part in parts if part],
        }
        for name, parts, note in sections
    ]
    shown = [section for section in shown if section["parts"]]
    return environment.get_template("page.html.jinja").render(
        title=title, verdicts=verdicts, sections=shown, notes=notes, mark=MARK
    )
