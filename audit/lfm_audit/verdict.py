"""Whether an audit is to be trusted, and whether it keeps its limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lfm_audit.figures import spread

MOST_SPREAD, MOST_BACKGROUND, FEWEST_RUNS = 0.05, 0.05, 3
_SWAPPED_MIB = 1.0
_CLOCK_S, _CLOCK_SHARE = 1.0, 0.02
_FREQUENCY_DROP = 0.9
LIMITS = {
    "ttft_ms": "from the question to the first token, every image, ms at most",
    "total_ms": "a whole answer, every image, ms at most",
    "decode_tok_s": "tokens a second, every image, at least",
    "peak_rss_mib": "largest resident memory, MiB at most",
    "anonymous_mib": "of it anonymous, MiB at most",
    "ready_ms": "a warm start until it can be asked, ms at most",
    "cold_ready_ms": "the same with files from disk, ms at most",
    "energy_per_answer_j": "of an answer, every image, J at most",
}
"""Name → meaning. All are judged by the median; memory by its maximum."""


def headlines(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(variant, image or "", name of LIMITS, figure) of what an audit is quoted for."""
    for variant, found in result["variants"].items():
        for name, start in (("ready_ms", "warm"), ("cold_ready_ms", "cold")):
            if found["starts"][start]:
                yield variant, "", name, found["starts"][start]["ready_ms"]
        for name, key in (("peak_rss_mib", "peak_mib"), ("anonymous_mib", "anonymous_mib")):
            if found["memory"][key]:
                yield variant, "", name, found["memory"][key]
        for image, answers in found["images"].items():
            for name in ("ttft_ms", "total_ms", "decode_tok_s", "energy_per_answer_j"):
                if answers[name]:
                    yield variant, image, name, answers[name]


def check_limits(result: Mapping[str, Any], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each limit against each headline it is about; one that nothing measured does not hold."""
    rows = []
    for name, limit in limits.items():
        found = [(variant, image, of) for variant, image, headline, of in headlines(result) if headline == name]
        for variant, image, of in found:
            measured = of["max"] if name.endswith("_mib") else of["median"]
            holds = measured >= limit if name == "decode_tok_s" else measured <= limit
            rows.append(
                {
                    "name": name,
                    "limit": limit,
                    "variant": variant,
                    "image": image or None,
                    "measured": measured,
                    "holds": holds,
                }
            )
        if not found:
            rows.append(
                {"name": name, "limit": limit, "variant": None, "image": None, "measured": None, "holds": False}
            )
    return rows


def verdict(result: Mapping[str, Any], *, changed_files: bool, elapsed: tuple[float, float]) -> dict[str, Any]:
    """{"valid", "reasons"}. `elapsed`: seconds the audit took by time.perf_counter() and by the system's clock."""
    machine = result["machine"]
    reasons = [*_clock(result, elapsed), *_throttled(machine)]
    own = max(((v["memory"]["swap_mib"] or {"max": 0.0})["max"] for v in result["variants"].values()), default=0.0)
    if max(machine["swapped_mib"], own) > _SWAPPED_MIB:
        reasons.append(
            f"swapped: {machine['swapped_mib']:.0f} MiB went to or came from swap, {own:.0f} MiB of the process "
            "were there"
        )
    share, worst = machine["background_share"]["mean"], machine["background_share"]["max"]
    if share > MOST_BACKGROUND:
        reasons.append(
            f"background load: others had {share:.0%} of the processors, {worst:.0%} at worst; close them, or wait "
            "for the host"
        )
    if changed_files:
        reasons.append("the bundle's files were changed while it was measured")
    for variant, found in result["variants"].items():
        for image, answers in found["images"].items():
            if len(answers["text_sha256"]) > 1:
                reasons.append(
                    f"output changed: {variant} said {len(answers['text_sha256'])} different things about {image}"
                )
        if found["starts"]["warm"]["ready_ms"]["n"] < FEWEST_RUNS:
            reasons.append(f"too few processes of {variant} to know the spread; raise --budget")
    for variant, image, name, of in headlines(result):
        if of["n"] >= FEWEST_RUNS and name != "cold_ready_ms" and spread(of) > MOST_SPREAD:
            about = f" ({image})" if image else ""
            reasons.append(f"spread: {name} of {variant}{about} lies {spread(of):.0%} around its median")
    return {"valid": not reasons, "reasons": reasons}


def _clock(result: Mapping[str, Any], elapsed: tuple[float, float]) -> Iterator[str]:
    ours, system = elapsed
    still = any(
        answers["total_ms"]["min"] <= 0 for found in result["variants"].values() for answers in found["images"].values()
    )
    if still or abs(ours - system) > max(_CLOCK_S, _CLOCK_SHARE * ours):
        yield f"the clock stood still or jumped: {ours:.1f} s by one clock, {system:.1f} s by another"


def _throttled(machine: Mapping[str, Any]) -> Iterator[str]:
    before, after = machine["throttle_bits_before"] or 0, machine["throttle_bits_after"] or 0
    if machine["throttled_while_measured"] or after & ~before:
        yield f"throttled: the firmware's bits were {before:#x} before and {after:#x} after; see to power and cooling"
    speeds: Sequence[float] = [s["frequency_mhz"] for s in machine["samples"] if s["frequency_mhz"]]
    third = len(speeds) // 3
    if third:
        first, last = sorted(speeds[:third])[third // 2], sorted(speeds[-third:])[third // 2]
        busy = sorted(speeds)[len(speeds) * 3 // 4]
        if last < busy * _FREQUENCY_DROP and last < first:
            yield f"throttled: the frequency fell from {first:.0f} to {last:.0f} MHz"
