"""Whether an audit is to be trusted, and whether it keeps its limits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lfm_audit.result import Audit, Limit, MachineResult, Verdict, as_written

MOST_SPREAD, MOST_BACKGROUND, FEWEST_RUNS = 0.05, 0.05, 3
_SWAPPED_MIB = 1.0
_CLOCK_S, _CLOCK_SHARE = 1.0, 0.02
_FREQUENCY_DROP = 0.9
_CLOCK, _CHANGED = "the clock", "the bundle's files were changed while it was measured"
LIMITS = {
    "ttft_ms": "from the question to the first token, every image, ms at most",
    "total_ms": "a whole answer, every image, ms at most",
    "decode_tok_s": "tokens a second, every image, at least",
    "peak_rss_mib": "largest resident memory, MiB at most",
    "anonymous_mib": "of it anonymous, MiB at most",
    "ready_ms": "a warm start until it is ready, ms at most",
    "cold_ready_ms": "the same with files from disk, ms at most",
    "energy_per_answer_j": "of an answer, every image, J at most",
}
"""Name → meaning. All are judged by the median; memory by its maximum."""


def check_limits(audit: Audit, limits: Mapping[str, float]) -> tuple[Limit, ...]:
    """Each limit against each headline it is about; one that nothing measured does not hold."""
    rows = []
    for name, limit in limits.items():
        about = [headline for headline in audit.headlines() if headline.name == name]
        for headline in about:
            figure = headline.figure.max if name.endswith("_mib") else headline.figure.median
            measured: float = as_written(figure)  # so that who reads the file finds the same verdict and digits
            holds = measured >= limit if name == "decode_tok_s" else measured <= limit
            rows.append(Limit(name, limit, headline.variant, headline.image or None, measured, holds))
        if not about:
            rows.append(Limit(name, limit, None, None, None, holds=False))
    return tuple(rows)


def judge(audit: Audit, *, changed_files: bool, elapsed: tuple[float, float]) -> Verdict:
    """Whether it is to be trusted.

    Args:
        audit: what was measured.
        changed_files: the bundle's files were changed meanwhile.
        elapsed: seconds the audit took by time.perf_counter() and by the system's clock.
    """
    reasons = [*_clock(audit, elapsed), *([_CHANGED] if changed_files else []), *_shown(audit)]
    return Verdict(not reasons, tuple(reasons))


def judged_again(audit: Audit) -> Audit:
    """An audit that was read, judged by its figures: its own word on verdict and limits is not believed, but for
    what no figure shows.
    """
    unseen = [reason for reason in audit.verdict.reasons if reason.startswith((_CLOCK, _CHANGED))]
    reasons = [*unseen, *_shown(audit)]
    limits = check_limits(audit, {limit.name: limit.limit for limit in audit.limits if limit.name in LIMITS})
    return replace(audit, limits=limits, verdict=Verdict(not reasons, tuple(reasons)))


def _shown(audit: Audit) -> Iterator[str]:
    """Reasons against an audit that its figures show."""
    yield from _throttled(audit.machine)
    yield from _disturbed(audit)
    for variant, found in audit.variants.items():
        for image, answers in found.images.items():
            if len(answers.text_sha256) > 1:
                yield f"output changed: {variant} said {len(answers.text_sha256)} different things about {image}"
        if found.starts.warm.ready_ms.n < FEWEST_RUNS:
            yield f"too few processes of {variant} to know the spread; raise --budget"
    for headline in audit.headlines():
        spread = headline.figure.spread
        if headline.figure.n >= FEWEST_RUNS and headline.name != "cold_ready_ms" and spread > MOST_SPREAD:
            about = f"{headline.variant} ({headline.image})" if headline.image else headline.variant
            yield f"spread: the MAD of {headline.name} of {about} is {spread:.0%} of its median"


def _disturbed(audit: Audit) -> Iterator[str]:
    machine = audit.machine
    own = max((v.memory.swap_mib.max for v in audit.variants.values() if v.memory.swap_mib), default=0.0)
    if max(machine.swapped_mib, own) > _SWAPPED_MIB:
        went = f"{machine.swapped_mib:.0f} MiB went to or came from swap"
        yield f"swapped: {went}, {own:.0f} MiB of the measured process were in swap"
    share = machine.background_share
    if share.mean > MOST_BACKGROUND:
        others = (
            f"other programs, or the host of a virtual machine, used {share.mean:.1%} of the processors, "
            f"{share.max:.0%} at most"
        )
        yield f"background load: {others}; close them, or wait for the host"


def _clock(audit: Audit, elapsed: tuple[float, float]) -> Iterator[str]:
    ours, system = elapsed
    still = any(answers.total_ms.min <= 0 for found in audit.variants.values() for answers in found.images.values())
    if still or abs(ours - system) > max(_CLOCK_S, _CLOCK_SHARE * ours):
        yield f"{_CLOCK} stood still or jumped: {ours:.1f} s by one clock, {system:.1f} s by another"


def _throttled(machine: MachineResult) -> Iterator[str]:
    before, after = machine.throttle_bits_before or 0, machine.throttle_bits_after or 0
    if machine.throttled_while_measured or after & ~before:
        yield (
            f"throttled: the firmware's bits were {before:#x} before and {after:#x} after; check power supply and "
            "cooling"
        )
    speeds = [s.frequency_mhz for s in machine.samples if s.frequency_mhz]
    third = len(speeds) // 3
    if third:
        first, last = sorted(speeds[:third])[third // 2], sorted(speeds[-third:])[third // 2]
        busy = sorted(speeds)[len(speeds) * 3 // 4]
        if last < busy * _FREQUENCY_DROP and last < first:
            yield f"throttled: the frequency fell from {first:.0f} to {last:.0f} MHz"


def grouped(reasons: Sequence[str]) -> list[str]:
    """The reasons for a reader: those about spread as one, with what helps."""
    spreads = [(found["share"], found["what"]) for reason in reasons if (found := _SPREAD.fullmatch(reason))]
    if len(spreads) < 2:
        return list(reasons)
    shares = sorted(spreads, key=lambda spread: int(spread[0]))
    (least, _), (most, what) = shares[0], shares[-1]
    between = f"{least} % to {most} %" if least != most else f"{most} %"
    said = f"spread: the MAD of {len(spreads)} figures is {between} of their medians, most for {what}; at most "
    said += f"{MOST_SPREAD:.0%} is valid. Close other programs, or raise --budget or --new-tokens"
    return [*(reason for reason in reasons if not _SPREAD.fullmatch(reason)), said]


_SPREAD = re.compile(r"spread: the MAD of (?P<what>.+) is (?P<share>\d+)% of its median")
