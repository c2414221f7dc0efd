"""An audit for people on a terminal, and as flat rows for a spreadsheet."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lfm_runtime.errors import counted

from lfm_audit.figures import Figure
from lfm_audit.result import Audit, VariantResult
from lfm_audit.verdict import grouped

_HEAD = (
    "image",
    "tokens",
    "views",
    "image ms",
    "vision",
    "prefill",
    "ttft ms",
    "per token",
    "tok/s",
    "total ms",
    "± MAD",
    "J",
)


def table(audit: Audit) -> str:
    """Return the audit as text for a terminal: verdict and limits, then what was measured."""
    lines = [verdict_line(audit), *(f"  {reason}" for reason in grouped(audit.verdict.reasons))]
    for limit in audit.limits:
        about = " ".join(part for part in (limit.variant, limit.image) if part)
        measured = "not measured" if limit.measured is None else f"{limit.measured:,.4g}"
        lines.append(f"{'holds ' if limit.holds else 'BROKEN'} {limit.name} {limit.limit:g}: {about} {measured}")
    lines.append("")
    for variant, found in audit.variants.items():
        lines += _variant_lines(variant, found)
    if audit.soak:
        soak = audit.soak
        steady = "" if soak.steady else " (not steady yet)"
        if len(soak.minutes) > 1:
            change = f"first token {soak.ttft_change:+.1%}, per token {soak.inter_token_change:+.1%} against the first"
            lines.append(f"soak, {counted(len(soak.minutes), 'minute')}{steady}: {change}")
        else:
            lines.append("soak: ended within its first minute, which has nothing to be compared with")
    machine = audit.machine
    if machine.temperature_max_c is not None:
        lines.append(f"temperature  at most {machine.temperature_max_c:.0f} °C")
    if machine.mean_w is not None:
        idle = f", idle {machine.idle_w:.2f}" if machine.idle_w is not None else ""
        peak = machine.peak_w or 0.0
        lines.append(f"power, W     mean {machine.mean_w:.2f}, peak {peak:.2f}{idle} ({machine.power_from})")
    lines += [f"no {sensor}: {reason}" for sensor, reason in machine.missing.items()]
    return "\n".join([*lines, *left_out(audit)])


def left_out(audit: Audit) -> list[str]:
    """The images that were not measured, by reason: one line for each."""
    reasons: dict[str, list[str]] = {}
    for image in audit.workload.skipped_images:
        reasons.setdefault(image.reason, []).append(image.name)
    return [
        f"left out: {names[0]}: {reason}"
        if len(names) == 1
        else f"{len(names)} images left out: {reason} ({names[0]} to {names[-1]})"
        for reason, names in reasons.items()
    ]


def _variant_lines(variant: str, found: VariantResult) -> list[str]:
    how = [counted(found.threads, "thread"), *([f"prefill {found.prefill}"] if found.prefill else [])]
    how.append("prepared" if found.prepared else "not prepared")
    lines = [f"{variant} ({', '.join(how)})"]
    lines += [f"  to fit the memory: {step}" for step in found.steps_down]
    lines += [f"  {warning}" for warning in found.warnings]
    starts = [f"{kind.replace('_', '-')} {start.ready_ms.median:,.0f}" for kind, start in found.starts.items()]
    prepare = f"; prepare {found.prepare_ms:,.0f}" if found.prepare_ms is not None else ""
    lines.append(f"  start, ms    {', '.join(starts)}{prepare}")
    memory = found.memory
    kinds = ("peak", memory.peak_mib), ("anonymous", memory.anonymous_mib), ("mapped", memory.mapped_mib)
    kept = [
        f"{name} {of.max if name == 'peak' else of.median:,.0f}" for name, of in (*kinds, ("pss", memory.pss_mib)) if of
    ]
    lines.append(f"  memory, MiB  {', '.join(kept)}; {found.disk_mib:,.0f} on disk")
    rows = [_HEAD]
    for name, image in found.images.items():
        stages, total, rate, joules = image.stages, image.total_ms, image.decode_tok_s, image.energy_per_answer_j
        rows.append(
            (
                name,
                str(image.image_tokens),
                str(image.views),
                f"{stages.image_ms.median + stages.preprocess_ms.median:,.0f}",
                f"{stages.vision_ms.median:,.0f}",
                f"{stages.prefill_ms.median:,.0f}",
                f"{image.ttft_ms.median:,.0f}",
                f"{1e3 / rate.median:.2f}" if rate and rate.median else "–",
                f"{rate.median:.1f}" if rate else "–",
                f"{total.median:,.0f}",
                f"{total.spread:.1%}" if total.median else "–",
                f"{joules.median:.2f}" if joules else "–",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  " + "  ".join((first.ljust(widths[0]), *cells)))
    return lines


def verdict_line(audit: Audit) -> str:
    """Return one line that says whether the audit is valid, and what was measured."""
    runs = sum(start.ready_ms.n for found in audit.variants.values() for _, start in found.starts.items())
    word = "valid" if audit.verdict.valid else "NOT VALID"
    early = f", ended early: {audit.stopped}" if audit.stopped else ""
    took = f"{runs} processes in {audit.duration_s:.0f} s{early}"
    return f"{word}: {took}; {audit.bundle.name}, profile {audit.profile.name}"


def rows_for_csv(audit: Audit) -> tuple[str, list[str]]:
    """Return (the header line, a line for each variant and image) as CSV."""
    rows = []
    for variant, found in audit.variants.items():
        for name, image in found.images.items():
            memory = found.memory
            rows.append(
                {
                    "created_unix_s": audit.created_unix_s,
                    "valid": audit.verdict.valid,
                    "bundle": audit.bundle.name,
                    "board": audit.device.get("board") or audit.device.get("cpu"),
                    "profile": audit.profile.name,
                    "onnxruntime": audit.software.get("onnxruntime"),
                    "variant": variant,
                    "prefill": found.prefill or "",
                    "threads": found.threads,
                    "prepared": found.prepared,
                    "image": name,
                    "views": image.views,
                    "image_tokens": image.image_tokens,
                    "prompt_tokens": image.prompt_tokens,
                    "new_tokens": image.new_tokens,
                    "answers": image.total_ms.n,
                    **{f"{stage}_median": _cell(of.median) for stage, of in image.stages.items()},
                    "ttft_ms_median": _cell(image.ttft_ms.median),
                    "ttft_ms_p90": _cell(image.ttft_ms.p90),
                    "total_ms_median": _cell(image.total_ms.median),
                    "total_ms_mad": _cell(image.total_ms.mad),
                    "decode_tok_s_median": _median(image.decode_tok_s),
                    "ready_ms_median": _cell(found.starts.warm.ready_ms.median),
                    "peak_mib_max": _cell(memory.peak_mib.max) if memory.peak_mib else "",
                    "anonymous_mib_max": _cell(memory.anonymous_mib.max) if memory.anonymous_mib else "",
                    "energy_per_answer_j_median": _median(image.energy_per_answer_j),
                }
            )

    def line(values: Any) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="").writerow(values)
        return out.getvalue()

    return (line(rows[0]) if rows else ""), [line(row.values()) for row in rows]


def _cell(value: float) -> float:
    return round(value, 4)


def _median(figure: Figure | None) -> float | str:
    return _cell(figure.median) if figure else ""


def is_csv(path: Path) -> bool:
    """Whether the file is there and begins as `rows_for_csv` writes it: rows can be appended."""
    wanted = b"created_unix_s,valid,bundle,"
    if not path.exists():
        return False
    with path.open("rb") as f:
        return f.read(len(wanted)) == wanted
