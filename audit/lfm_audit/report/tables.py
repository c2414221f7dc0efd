"""What a report says in rows, for HTML and Markdown alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lfm_audit.compare import Change, changes, differences
from lfm_audit.report.source import Audit, Series

NONE = "–"


@dataclass(frozen=True)
class Row:
    """One line; `bad` is marked."""

    cells: Sequence[str]
    bad: bool = False


@dataclass(frozen=True)
class Table:
    """`texts`: columns of words, which may be broken over lines."""

    head: Sequence[str]
    rows: Sequence[Row]
    texts: Sequence[int] = field(default_factory=tuple)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def markdown(self) -> str:
        """As GitHub shows it."""
        line = [" --- " if n == 0 or n in self.texts else " ---: " for n in range(len(self.head))]
        rows = [[f"**{cell}**" if row.bad and cell else cell for cell in row.cells] for row in self.rows]
        escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [list(self.head), *rows]]
        head, *body = ["| " + " | ".join(row) + " |" for row in escaped]
        return "\n".join([head, "|" + "|".join(line) + "|", *body])


def headline_table(series: Sequence[Series]) -> Table:
    """A row for each variant and image, with the spread."""
    rows = []
    for one in series:
        found = one.result
        memory, quality = found["memory"], found["quality"]
        for n, (name, image) in enumerate(found["images"].items()):
            kept = (
                [
                    _of(memory["peak_mib"], 0),
                    _of(memory["anonymous_mib"], 0),
                    _of(found["starts"]["warm"]["ready_ms"], 0),
                    f"{quality['kl']:.2g}" if quality else NONE,
                ]
                if n == 0
                else [""] * 4
            )
            rows.append(
                Row(
                    [
                        one.label if n == 0 else "",
                        name,
                        _spread(image["ttft_ms"]),
                        _of(image["stages"]["vision_ms"], 0),
                        _spread(image["total_ms"]),
                        _of(image["decode_tok_s"], 1),
                        _of(image["energy_per_answer_j"], 2),
                        *kept,
                    ]
                )
            )
    head = [
        "",
        "image",
        "first token, ms",
        "vision, ms",
        "answer, ms",
        "tok/s",
        "J",
        "peak, MiB",
        "anonymous",
        "start, ms",
        "KL to fp32",
    ]
    return Table(head, rows, (1,))


def limits_table(audits: Sequence[Audit]) -> Table:
    """Kept or broken."""
    rows = [
        Row(
            [
                audit.name,
                limit["name"],
                f"{limit['limit']:g}",
                limit["variant"] or NONE,
                limit["image"] or NONE,
                NONE if limit["measured"] is None else f"{limit['measured']:,.4g}",
                "holds" if limit["holds"] else "broken",
            ],
            bad=not limit["holds"],
        )
        for audit in audits
        for limit in audit.result["limits"]
    ]
    return Table(["audit", "limit", "", "variant", "image", "measured", ""], rows)


def changes_table(audits: Sequence[Audit]) -> Table:
    """Each audit after the first, against it; for one audit of several variants, those against its first."""
    rows = []
    if len(audits) == 1:
        rows = _variants_compared(audits[0])
    for other in audits[1:]:
        for difference in differences(audits[0].result, other.result):
            rows.append(Row([other.name, "differs", difference, "", "", "", ""]))
        for change in changes(audits[0].result, other.result):
            of = f"{change.variant} {change.image}".strip()
            rows.append(_change(other.name, of, change.name, change.before, change.after, change.word()))
    return Table(["", "of", "figure", "before", "after", "change", ""], rows, (1, 2, 6))


def _variants_compared(audit: Audit) -> list[Row]:
    first, *others = audit.result["variants"]
    rows = []
    for other in others:
        for image in audit.result["variants"][first]["images"]:
            for name in ("ttft_ms", "total_ms", "decode_tok_s"):
                before, after = (audit.result["variants"][v]["images"][image][name] for v in (first, other))
                word = Change(other, image, name, before, after).word()
                rows.append(_change(f"{other} against {first}", image, name, before, after, word))
    return rows


def _change(name: str, of: str, figure: str, before: Mapping[str, Any], after: Mapping[str, Any], word: str) -> Row:
    ratio = f"{after['median'] / before['median'] - 1:+.1%}" if before["median"] else NONE
    cells = [name, of, figure, f"{before['median']:,.1f}", f"{after['median']:,.1f}", ratio, word]
    return Row(cells, bad=word == "worse")


def machine_table(audits: Sequence[Audit]) -> Table:
    """What the machine did meanwhile."""
    rows = []
    for audit in audits:
        m = audit.result["machine"]
        rows.append(
            Row(
                [
                    audit.name,
                    m["governor"] or NONE,
                    _number(m["temperature_max_c"], 0),
                    _hex(m["throttle_bits_before"]),
                    _hex(m["throttle_bits_after"]),
                    _number(m["available_min_mib"], 0),
                    f"{m['background_share']['median']:.1%}",
                    _number(m["swapped_mib"], 0),
                    _number(m["idle_w"], 2),
                    _number(m["mean_w"], 2),
                    _number(m["peak_w"], 2),
                ]
            )
        )
    head = [
        "audit",
        "governor",
        "°C at most",
        "throttle bits before",
        "after",
        "MiB free, least",
        "others' share",
        "MiB swapped",
        "W idle",
        "mean",
        "peak",
    ]
    return Table(head, rows, (1,))


def figures_table(series: Sequence[Series]) -> Table:
    """Every figure with its statistics."""
    rows = []
    for one in series:
        found = one.result
        named: list[tuple[str, Any]] = [
            (f"{kind} start: {key}", start[key])
            for kind, start in found["starts"].items()
            if start
            for key in ("ready_ms", "python_ms", "import_ms", "open_ms")
        ]
        named += [(f"warm start: {name}", of) for name, of in found["starts"]["warm"]["graphs_ms"].items()]
        named += [
            (key, found["memory"][key]) for key in ("peak_mib", "anonymous_mib", "mapped_mib", "pss_mib", "swap_mib")
        ]
        for image, of in found["images"].items():
            keys = (
                "first_ttft_ms",
                "ttft_ms",
                "total_ms",
                "vision_per_view_ms",
                "inter_token_ms",
                "prefill_tok_s",
                "decode_tok_s",
                "energy_per_answer_j",
                "energy_per_token_j",
            )
            named += [(f"{image}: {key}", of[key]) for key in keys] + [
                (f"{image}: {key}", of["stages"][key]) for key in of["stages"]
            ]
        rows += [Row([one.label, name, *_statistics(of)]) for name, of in named if of]
    return Table(["", "figure", "n", "median", "MAD", "mean", "p90", "p95", "min", "max", "95 %"], rows, (1,))


def _statistics(of: Mapping[str, Any]) -> list[str]:
    digits = 0 if of["median"] >= 1000 else 1 if of["median"] >= 10 else 3
    between = NONE if of["low"] is None else f"{of['low']:,.{digits}f} … {of['high']:,.{digits}f}"
    return [
        str(of["n"]),
        *(_number(of[key], digits) for key in ("median", "mad", "mean", "p90", "p95", "min", "max")),
        between,
    ]


def settings_table(audits: Sequence[Audit]) -> Table:
    """Machine, software, profile; a column an audit."""
    rows: list[tuple[str, list[Any]]] = [
        ("machine", [audit.where for audit in audits]),
        (
            "cores",
            [
                " + ".join(f"{c['count']} × {c['name'] or 'core'}" for c in audit.result["device"]["cores"])
                for audit in audits
            ],
        ),
        ("memory, MiB", [audit.result["device"]["ram_total_mib"] for audit in audits]),
        ("profile", [audit.result["profile"]["name"] for audit in audits]),
    ]
    for found in (
        [audit.result["profile"]["settings"] for audit in audits],
        [audit.result["software"] for audit in audits],
    ):
        rows += [(name, [of.get(name) for of in found]) for name in found[0]]
    rows += [
        (f"image {name}", [_pixels(audit.result["workload"]["images"].get(name)) for audit in audits])
        for name in audits[0].result["workload"]["images"]
    ]
    rows += [
        ("question", [audit.result["workload"]["question"] for audit in audits]),
        ("measured", [audit.when for audit in audits]),
    ]
    shown = [
        Row([name, *(_value(value) for value in values)])
        for name, values in rows
        if any(v not in (None, [], "") for v in values)
    ]
    return Table(["", *(audit.name for audit in audits)], shown, tuple(range(1, len(audits) + 1)))


def tuning_tables(tuning: Mapping[str, Any]) -> tuple[Mapping[str, Any], Table, Table]:
    """(the chosen point, the front, the chosen point's settings)."""
    by_settings = {_key(p["settings"]): p for p in tuning["points"] if p["latency_ms"]}
    front = [by_settings[_key(settings)] for settings in tuning["front"]]
    chosen = by_settings[_key(tuning["chosen"])]
    names = list(tuning["front"][0])
    rows = [
        Row(
            [
                str(number),
                *(_value(p["settings"][name]) for name in names),
                f"{p['ms']:,.0f}",
                f"{min(p['latency_ms'].values()):,.0f}",
                f"{max(p['latency_ms'].values()):,.0f}",
                f"{p['peak_mib']:,.0f}",
                f"{p['anonymous_mib']:,.0f}",
                f"{p['kl'] or 0:.4f}",
                str(len(p["latency_ms"])),
            ]
        )
        for number, p in enumerate(front, 1)
    ]
    cost = {
        "answer, ms": f"{chosen['ms']:,.0f}",
        "peak, MiB": f"{chosen['peak_mib']:,.0f}",
        "KL": f"{chosen['kl'] or 0:.4f}",
    }
    settings = [
        Row([name, value]) for name, value in {**{n: _value(v) for n, v in chosen["settings"].items()}, **cost}.items()
    ]
    return (
        chosen,
        Table(["", *names, "ms", "min", "max", "MiB", "anonymous", "KL", "n"], rows),
        Table(["", ""], settings),
    )


def _key(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(settings.items()))


def _of(figure: Mapping[str, Any] | None, digits: int) -> str:
    return NONE if not figure else f"{figure['median']:,.{digits}f}"


def _spread(figure: Mapping[str, Any]) -> str:
    return f"{figure['median']:,.0f} ± {figure['mad']:,.0f}"


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def _hex(bits: int | None) -> str:
    return NONE if bits is None else f"{bits:#x}"


def _pixels(image: Mapping[str, Any] | None) -> str | None:
    return f"{image['width']}×{image['height']}" if image else None


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
