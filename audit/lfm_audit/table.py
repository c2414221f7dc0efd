"""An audit for people on a terminal, and as flat rows for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any


def table(result: Mapping[str, Any]) -> str:
    """The verdict first, then what it cost."""
    lines = [verdict_line(result), *(f"  {reason}" for reason in result["verdict"]["reasons"])]
    for limit in result["limits"]:
        about = " ".join(part for part in (limit["variant"], limit["image"]) if part)
        measured = "not measured" if limit["measured"] is None else f"{limit['measured']:,.4g}"
        lines.append(
            f"{'holds ' if limit['holds'] else 'BROKEN'} {limit['name']} {limit['limit']:g}: {about} {measured}"
        )
    lines.append("")
    for variant, found in result["variants"].items():
        how = [f"{found['threads']} threads", *([f"prompts read by {found['prefill']}"] if found["prefill"] else [])]
        how.append("prepared" if found["prepared"] else "not prepared")
        lines.append(f"{variant} ({', '.join(how)})")
        lines += [f"  to fit the memory: {step}" for step in found["steps_down"]]
        lines += [f"  {warning}" for warning in found["warnings"]]
        starts = [f"{kind.replace('_', '-')} {_short(of['ready_ms'])}" for kind, of in found["starts"].items() if of]
        prepare = f"; prepare {found['prepare_ms']:,.0f}" if found["prepare_ms"] is not None else ""
        lines.append(f"  start, ms    {', '.join(starts)}{prepare}")
        memory = found["memory"]
        kept = [f"peak {_short(memory['peak_mib'])}"]
        kept += [
            f"{name} {_short(memory[f'{name}_mib'])}"
            for name in ("anonymous", "mapped", "pss")
            if memory[f"{name}_mib"]
        ]
        lines.append(f"  memory, MiB  {', '.join(kept)}; {found['disk_mib']:,.0f} on disk")
        head = (
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
        rows = [head]
        for name, image in found["images"].items():
            stages, total = image["stages"], image["total_ms"]
            per_token = image["inter_token_ms"]
            rows.append(
                (
                    name,
                    str(image["image_tokens"]),
                    str(image["views"]),
                    _of(stages["image_ms"], stages["preprocess_ms"]),
                    _of(stages["vision_ms"]),
                    _of(stages["prefill_ms"]),
                    _of(image["ttft_ms"]),
                    f"{per_token['median']:.2f}" if per_token else "–",
                    f"{image['decode_tok_s']['median']:.1f}" if image["decode_tok_s"] else "–",
                    _of(total),
                    f"{total['mad'] / total['median']:.1%}" if total["median"] else "–",
                    f"{image['energy_per_answer_j']['median']:.2f}" if image["energy_per_answer_j"] else "–",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines += [
            "  "
            + "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
    if result["soak"]:
        soak = result["soak"]
        change = (
            f"first token {soak['ttft_change']:+.1%}, per token {soak['inter_token_change']:+.1%} against the "
            "first minute"
        )
        lines.append(f"soak, {len(soak['minutes'])} minutes{'' if soak['steady'] else ' (not steady yet)'}: {change}")
    machine = result["machine"]
    if machine["temperature_max_c"] is not None:
        lines.append(f"temperature  at most {machine['temperature_max_c']:.0f} °C")
    if machine["mean_w"] is not None:
        idle = f", idle {machine['idle_w']:.2f}" if machine["idle_w"] is not None else ""
        lines.append(
            f"power, W     mean {machine['mean_w']:.2f}, peak {machine['peak_w']:.2f}{idle} ({machine['power_from']})"
        )
    lines += [f"no {sensor}: {reason}" for sensor, reason in machine["missing"].items()]
    lines += [f"left out: {image['name']}: {image['reason']}" for image in result["workload"]["skipped_images"]]
    return "\n".join(lines)


def verdict_line(result: Mapping[str, Any]) -> str:
    """Valid or not, in a few words."""
    runs = sum(of["ready_ms"]["n"] for found in result["variants"].values() for of in found["starts"].values() if of)
    word = "valid" if result["verdict"]["valid"] else "NOT VALID"
    took = (
        f"{runs} processes in {result['duration_s']:.0f} "
        f"s{', ended early: ' + result['stopped'] if result['stopped'] else ''}"
    )
    return f"{word}: {took}; {result['bundle']['name']}, profile {result['profile']['name']}"


def _of(*figures: Mapping[str, Any]) -> str:
    return f"{sum(of['median'] for of in figures):,.0f}"


def _short(of: Mapping[str, Any]) -> str:
    return f"{of['median']:,.0f}"


def rows_for_csv(result: Mapping[str, Any]) -> tuple[str, list[str]]:
    """(header, a row for each variant and image)."""
    rows = []
    for variant, found in result["variants"].items():
        for name, image in found["images"].items():
            rows.append(
                {
                    "created_unix_s": result["created_unix_s"],
                    "valid": result["verdict"]["valid"],
                    "bundle": result["bundle"]["name"],
                    "board": result["device"]["board"] or result["device"]["cpu"],
                    "profile": result["profile"]["name"],
                    "onnxruntime": result["software"]["onnxruntime"],
                    "variant": variant,
                    "prefill": found["prefill"] or "",
                    "threads": found["threads"],
                    "prepared": found["prepared"],
                    "image": name,
                    "views": image["views"],
                    "image_tokens": image["image_tokens"],
                    "prompt_tokens": image["prompt_tokens"],
                    "new_tokens": image["new_tokens"],
                    "answers": image["total_ms"]["n"],
                    **{f"{stage}_median": of["median"] for stage, of in image["stages"].items()},
                    "ttft_ms_median": image["ttft_ms"]["median"],
                    "ttft_ms_p90": image["ttft_ms"]["p90"],
                    "total_ms_median": image["total_ms"]["median"],
                    "total_ms_mad": image["total_ms"]["mad"],
                    "decode_tok_s_median": (image["decode_tok_s"] or {"median": ""})["median"],
                    "ready_ms_median": found["starts"]["warm"]["ready_ms"]["median"],
                    "peak_mib_max": found["memory"]["peak_mib"]["max"],
                    "anonymous_mib_max": (found["memory"]["anonymous_mib"] or {"max": ""})["max"],
                    "energy_per_answer_j_median": (image["energy_per_answer_j"] or {"median": ""})["median"],
                }
            )

    def line(values: Any) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="").writerow(values)
        return out.getvalue()

    return (line(rows[0]) if rows else ""), [line(row.values()) for row in rows]
