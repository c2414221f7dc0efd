"""The same for a pull request: verdict, what it costs, what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfm_audit.report.source import Audit, all_series
from lfm_audit.report.tables import changes_table, headline_table, limits_table, tuning_tables
from lfm_audit.table import verdict_line


def audit_markdown(audits: Sequence[Audit]) -> str:
    """Plots are for the page."""
    parts = []
    for audit in audits:
        parts.append(f"**{audit.name}**: {verdict_line(audit.result)} ({audit.where}, {audit.when})")
        parts += [f"- {reason}" for reason in audit.result["verdict"]["reasons"]]
    tables = [
        ("What it costs", headline_table(all_series(audits))),
        ("Limits", limits_table(audits)),
        ("What changed", changes_table(audits)),
    ]
    lines = ["\n".join(parts), *(f"### {title}\n\n{table.markdown()}" for title, table in tables if table)]
    return "\n\n".join(lines) + "\n"


def tuning_markdown(tuning: Mapping[str, Any]) -> str:
    """The front, and what was chosen."""
    _, front, settings = tuning_tables(tuning)
    return f"### Tuned for {tuning['objective']}\n\n{settings.markdown()}\n\n### The front\n\n{front.markdown()}\n"
