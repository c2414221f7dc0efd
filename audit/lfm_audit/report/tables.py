"""What a report says in rows, for HTML and Markdown alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lfm_runtime.errors import counted

from lfm_audit.compare import Change, changes, differences
from lfm_audit.figures import Figure
from lfm_audit.report.source import Named, Series
from lfm_audit.result import ImageFacts, VariantResult
from lfm_audit.tune.result import TuningResult

NONE = "–"


@dataclass(frozen=True)
class Row:
    """One row of a table; it is highlighted where `bad`."""

    cells: Sequence[str]
    bad: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the columns in `texts` hold words, which may be broken over lines."""

    head: Sequence[str]
    rows: Sequence[Row]
    texts: Sequence[int] = field(default_factory=tuple)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def without_empty(self) -> Table:
        """Return the table without columns that say nothing in any row."""
        there = [n for n in range(len(self.head)) if n == 0 or any(row.cells[n] not in ("", NONE) for row in self.rows)]
        rows = [Row([row.cells[n] for n in there], row.bad) for row in self.rows]
        return Table([self.head[n] for n in there], rows, [at for at, n in enumerate(there) if n in self.texts])

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown; the cells of bad rows are bold."""
        line = [" --- " if n == 0 or n in self.texts else " ---: " for n in range(len(self.head))]
        rows = [[f"**{cell}**" if row.bad and cell else cell for cell in row.cells] for row in self.rows]
        escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [list(self.head), *rows]]
        head, *body = ["| " + " | ".join(row) + " |" for row in escaped]
        return "\n".join([head, "|" + "|".join(line) + "|", *body])


WORDS = {
    "ttft_ms": "first token, ms",
    "total_ms": "answer, ms",
    "decode_tok_s": "tokens a second",
    "energy_per_answer_j": "energy of an answer, J",
    "energy_per_token_j": "energy of a token, J",
    "peak_rss_mib": "peak memory, MiB",
    "peak_mib": "peak memory, MiB",
    "anonymous_mib": "anonymous memory, MiB",
    "mapped_mib": "mapped files, MiB",
    "pss_mib": "memory with shares of what others map too (PSS), MiB",
    "swap_mib": "in swap, MiB",
    "ready_ms": "ready, warm start, ms",
    "cold_ready_ms": "ready, cold start, ms",
    "first_ttft_ms": "first token of a process's first answer, ms",
    "vision_per_view_ms": "vision of one view, ms",
    "inter_token_ms": "between two tokens, ms",
    "prefill_tok_s": "prefill, tokens a second",
    "python_ms": "Python starts, ms",
    "import_ms": "imports, ms",
    "open_ms": "bundle read, ms",
    "image_ms": "decode image, ms",
    "prompt_ms": "prompt, ms",
    "preprocess_ms": "preprocess, ms",
    "load_ms": "load graphs, ms",
    "vision_ms": "vision, ms",
    "embed_ms": "embed, ms",
    "prefill_ms": "prefill, ms",
    "decode_ms": "decode, ms",
    "detokenize_ms": "detokenize, ms",
    "other_ms": "other, ms",
}
"""A figure's name in JSON → in words."""
_MUCH = 0.05
"""Of a figure that got worse, from when on it is highlighted: compare's default."""


def answers_table(series: Sequence[Series]) -> Table:
    """Return a row for each variant and image: times, speed and energy of an answer."""
    rows = [
        Row(
            [
                one.label,
                name,
                _spread(image.ttft_ms),
                _of(image.stages.vision_ms, 0),
                _spread(image.total_ms),
                _of(image.decode_tok_s, 1),
                _of(image.energy_per_answer_j, 2),
            ]
        )
        for one in series
        for name, image in one.result.images.items()
    ]
    head = ["", "image", "first token, ms", "vision, ms", "answer, ms", "tokens/s", "energy, J"]
    return Table(head, rows, (1,)).without_empty()


def _loss(found: VariantResult, *, several_to: bool, several_asked: bool) -> str:
    """KL ± its standard error, with what tells it from other rows': to what, of how many questions, measured how."""
    error = "" if found.kl_error is None else f" ± {found.kl_error:.1g}"
    parts = [f"{found.kl:.2g}{error}{f' to {found.kl_to}' * several_to}"]
    parts += [counted(found.kl_questions, "question")] if several_asked and found.kl_questions else []
    parts += [found.kl_with] if found.kl_with else []
    return ", ".join(parts)


def variants_table(series: Sequence[Series]) -> Table:
    """Return a row for each variant: memory, start, size and quality."""
    rows = []
    judged = [one.result for one in series if one.result.kl is not None]
    to, asked = sorted({found.kl_to for found in judged}), {found.kl_questions for found in judged}
    for one in series:
        found, starts = one.result, dict(one.result.starts.items())
        peak = found.memory.peak_mib
        cells = [
            one.label,
            NONE if not peak else f"{peak.max:,.0f}",
            _of(found.memory.anonymous_mib, 0),
            *(_of(starts[kind].ready_ms, 0) if kind in starts else NONE for kind in ("warm", "cold", "first_ever")),
            f"{found.disk_mib:,.0f}",
            NONE if found.kl is None else _loss(found, several_to=len(to) > 1, several_asked=len(asked) > 1),
        ]
        rows.append(Row(cells))
    head = [
        "",
        "peak, MiB",
        "anonymous, MiB",
        "start, ms",
        "cold start",
        "first-ever start",
        "on disk, MiB",
        f"KL to {to[0]}" if len(to) == 1 else "KL",
    ]
    return Table(head, rows).without_empty()


def limits_table(audits: Sequence[Named]) -> Table:
    """Return a row for each limit of each audit, which "holds" or is "broken"."""
    rows = [
        Row(
            [
                named.name,
                WORDS.get(limit.name, limit.name),
                f"{limit.limit:g}",
                "holds" if limit.holds else "broken",
                NONE if limit.measured is None else f"{limit.measured:,.4g}",
                limit.variant or NONE,
                limit.image or NONE,
            ],
            bad=not limit.holds,
        )
        for named in audits
        for limit in named.audit.limits
    ]
    return Table(["audit", "limit", "asked", "", "measured", "variant", "image"], rows, (1, 3, 5, 6)).without_empty()


def changes_table(audits: Sequence[Named]) -> Table:
    """Each audit after the first, against it; for one audit of several variants, those against its first."""
    rows = []
    if len(audits) == 1:
        rows = _variants_compared(audits[0])
    for other in audits[1:]:
        for difference in differences(audits[0].audit, other.audit):
            rows.append(Row([other.name, "differs", difference, "", "", "", ""]))
        for change in changes(audits[0].audit, other.audit):
            of = f"{change.variant} {change.image}".strip()
            rows.append(_change(other.name, of, change, regression=True))
    sides = ["before", "after"] if len(audits) > 1 else [next(iter(audits[0].audit.variants)), "the other"]
    return Table(["", "of", "figure", *sides, "change", ""], rows, (1, 2, 6))


def _variants_compared(named: Named) -> list[Row]:
    first, *others = named.audit.variants
    rows = []
    for other in others:
        for image in named.audit.variants[first].images:
            for name in ("ttft_ms", "total_ms", "decode_tok_s"):
                before, after = (getattr(named.audit.variants[v].images[image], name) for v in (first, other))
                if before is None or after is None:
                    continue
                change = Change(f"{other} against {first}", image, name, before, after)
                rows.append(_change(change.variant, image, change, regression=False))
    return rows


def _change(name: str, of: str, change: Change, *, regression: bool) -> Row:
    """A row; highlighted where a later audit is worse by more than `compare` allows by default."""
    ratio = NONE if change.ratio is None else f"{change.ratio - 1:+.1%}"
    before, after = f"{change.before.median:,.1f}", f"{change.after.median:,.1f}"
    word = change.word()
    bad = regression and word == "worse" and change.worse_by() > _MUCH
    figure = WORDS.get(change.name, change.name) + (" (median)" if change.name.endswith("_mib") else "")
    return Row([name, of, figure, before, after, ratio, word], bad=bad)


def machine_table(audits: Sequence[Named]) -> Table:
    """Return a row for each audit: sensors, memory, power and background load while it was measured."""
    rows = []
    for named in audits:
        m = named.audit.machine
        cells = [
            named.name,
            m.governor or NONE,
            _number(m.temperature_max_c, 0),
            _hex(m.throttle_bits_before),
            _hex(m.throttle_bits_after),
            _number(m.available_min_mib, 0),
            f"{m.background_share.mean:.1%}",
            _number(m.swapped_mib, 0),
            _number(m.idle_w, 2),
            _number(m.mean_w, 2),
            _number(m.peak_w, 2),
        ]
        rows.append(Row(cells))
    head = [
        "audit",
        "governor",
        "°C at most",
        "throttle bits before",
        "after",
        "least free, MiB",
        "others' share of the processors, mean",
        "swapped, MiB",
        "idle, W",
        "mean, W",
        "peak, W",
    ]
    return Table(head, rows, (1,)).without_empty()


def figures_table(series: Sequence[Series]) -> Table:
    """Return a row of statistics for each figure of each series."""
    rows = []
    for one in series:
        rows += [Row([one.label, _words(name), *_statistics(of)]) for name, of in _figures(one.result) if of]
    return Table(["", "figure", "n", "median", "MAD", "mean", "p90", "p95", "min", "max", "95 %"], rows, (1,))


def _figures(found: VariantResult) -> Iterator[tuple[str, Figure | None]]:
    for kind, start in found.starts.items():
        for key in ("ready_ms", "python_ms", "import_ms", "open_ms"):
            yield f"{kind.replace('_', '-')} start: {key}", getattr(start, key)
    for name, of in found.starts.warm.graphs_ms.items():
        yield f"warm start: {name}", of
    for key in ("peak_mib", "anonymous_mib", "mapped_mib", "pss_mib", "swap_mib"):
        yield key, getattr(found.memory, key)
    for image, answers in found.images.items():
        for key in (
            "first_ttft_ms",
            "ttft_ms",
            "total_ms",
            "vision_per_view_ms",
            "inter_token_ms",
            "prefill_tok_s",
            "decode_tok_s",
            "energy_per_answer_j",
            "energy_per_token_j",
        ):
            yield f"{image}: {key}", getattr(answers, key)
        yield from ((f"{image}: {key}", of) for key, of in answers.stages.items())


def _words(name: str) -> str:
    """Return "small: first token, ms" for "small: ttft_ms"."""
    about, colon, key = name.rpartition(": ")
    if key == "ready_ms" and about.endswith(" start"):
        return f"{about}{colon}ready, ms"
    return f"{about}{colon}{WORDS.get(key, key)}"


def _statistics(of: Figure) -> list[str]:
    digits = 0 if of.median >= 1000 else 1 if of.median >= 10 else 3
    between = NONE if of.low is None or of.high is None else f"{of.low:,.{digits}f} … {of.high:,.{digits}f}"
    values = (of.median, of.mad, of.mean, of.p90, of.p95, of.min, of.max)
    return [str(of.n), *(_number(value, digits) for value in values), between]


def settings_table(audits: Sequence[Named]) -> Table:
    """Return machine, software and profile, one column an audit."""
    found = [named.audit for named in audits]
    cores = [
        " + ".join(f"{c['count']} × {c['name'] or 'core'}" for c in audit.device.get("cores") or ()) for audit in found
    ]
    rows: list[tuple[str, list[Any]]] = [
        ("machine", [named.where for named in audits]),
        ("cores", cores),
        ("memory, MiB", [audit.device.get("ram_total_mib") for audit in found]),
        ("model", [audit.bundle.source.name if audit.bundle.source else None for audit in found]),
        ("adapter", [audit.bundle.source.adapter if audit.bundle.source else None for audit in found]),
        ("bundle", [audit.bundle.name for audit in found]),
        (
            "weights",
            [", ".join(f"{v}: {mark[:12]}" for v, mark in audit.bundle.fingerprint.items()) for audit in found],
        ),
        ("measured variants", [", ".join(map(_run, audit.variants.items())) for audit in found]),
        ("profile", [audit.profile.name for audit in found]),
    ]
    settings = [{name: v for name, v in audit.profile.settings.items() if name not in _RUN} for audit in found]
    for of in (settings, [audit.software for audit in found]):
        rows += [(name, [one.get(name) for one in of]) for name in of[0]]
    rows.append(("lfm-edge", [audit.tool.version for audit in found]))
    rows += [
        (f"image {name}", [_pixels(audit.workload.images.get(name)) for audit in found])
        for name in found[0].workload.images
    ]
    rows += [("question", [audit.workload.question for audit in found]), ("measured", [named.when for named in audits])]
    shown = [
        Row([name, *(_value(value) for value in values)])
        for name, values in rows
        if any(v not in (None, [], "") for v in values)
    ]
    return Table(["", *(audit.name for audit in audits)], shown, tuple(range(1, len(audits) + 1)))


_RUN = ("variant", "prefill", "threads")
"""Settings of a profile that are wishes; what was run stands beside the variants."""


def _weights(marks: Mapping[str, str]) -> str:
    return ", ".join(f"{variant}: {mark[:12]}" for variant, mark in marks.items())


def _run(measured: tuple[str, VariantResult]) -> str:
    name, found = measured
    prefill = f", {found.prefill} for the prefill" if found.prefill else ""
    return f"{name} ({counted(found.threads, 'thread')}{prefill})"


def tuning_tables(tuning: TuningResult) -> tuple[Table, Table]:
    """Return (the Pareto front, the chosen point's settings and costs)."""
    chosen, names = tuning.point(tuning.chosen), list(tuning.chosen)
    rows = [
        Row(
            [
                f"{number}{' chosen' if p is chosen else ''}",
                f"{p.ms:,.0f}",
                f"{p.peak_mib:,.0f}",
                _number(p.kl, 4),
                f"{min(p.latency_ms.values()):,.0f}",
                f"{max(p.latency_ms.values()):,.0f}",
                str(len(p.latency_ms)),
                f"{p.anonymous_mib:,.0f}",
                *(_value(p.settings[name]) for name in names),
            ]
        )
        for number, p in enumerate(map(tuning.point, tuning.front), 1)
    ]
    cost = {"answer, ms": f"{chosen.ms:,.0f}", "peak, MiB": f"{chosen.peak_mib:,.0f}", "KL": _number(chosen.kl, 4)}
    settings = {**{name: _value(chosen.settings[name]) for name in names}, **cost}
    head = ["", "answer, ms", "peak, MiB", "KL", "min", "max", "rounds", "anonymous", *names]
    return Table(head, rows), Table(["", ""], [Row([name, value]) for name, value in settings.items()])


def _of(figure: Figure | None, digits: int) -> str:
    return NONE if not figure else f"{figure.median:,.{digits}f}"


def _spread(figure: Figure) -> str:
    return f"{figure.median:,.0f} ± {figure.mad:,.0f}"


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def _hex(bits: int | None) -> str:
    return NONE if bits is None else f"{bits:#x}"


def _pixels(image: ImageFacts | None) -> str | None:
    return f"{image.width}×{image.height}" if image else None


def _value(value: Any) -> str:
    if value is None or value == []:
        return NONE
    if isinstance(value, bool):
        return "on" if value else "off"
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
