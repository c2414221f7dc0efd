"""The same for a pull request: verdict, what it costs, what changed."""

from __future__ import annotations

from collections.abc import Sequence

from lfm_audit.report.fleet import boards_table, kinds
from lfm_audit.report.source import MARK, Named, all_series, changes_title
from lfm_audit.report.tables import answers_table, changes_table, limits_table, tuning_tables, variants_table
from lfm_audit.table import verdict_line
from lfm_audit.tune.result import TuningResult
from lfm_audit.verdict import grouped


def audit_markdown(audits: Sequence[Named]) -> str:
    """Return verdicts and tables of the audits as Markdown; plots are left to the page."""
    parts = []
    for one in audits:
        parts.append(f"**{one.name}**: {verdict_line(one.audit)} ({one.where}, {one.when})")
        parts += [f"- {reason}" for reason in grouped(one.audit.verdict.reasons)]
    tables = [
        *((title, boards_table(boards)) for title, boards in kinds(audits)),
        ("What it costs", answers_table(all_series(audits))),
        ("Memory and start", variants_table(all_series(audits))),
        ("Limits", limits_table(audits)),
        (changes_title(audits), changes_table(audits)),
    ]
    lines = ["\n".join(parts), *(f"### {title}\n\n{table.markdown()}" for title, table in tables if table)]
    return "\n\n".join([*lines, MARK]) + "\n"


def tuning_markdown(tuning: TuningResult) -> str:
    """Return the chosen settings and the front of a tuning as Markdown."""
    front, settings = tuning_tables(tuning)
    chosen = f"### Tuned for {tuning.objective}\n\n{tuning.why}\n\n{settings.markdown()}"
    return f"{chosen}\n\n### The front\n\n{front.markdown()}\n\n{MARK}\n"
