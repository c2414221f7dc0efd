"""Many boards: by their kind, and which of them are not like the others of theirs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lfm_audit.compare import Change
from lfm_audit.figures import Figure
from lfm_audit.report.source import Named
from lfm_audit.report.tables import NONE, WORDS, Row, Table
from lfm_audit.result import Audit, Headline

FEWEST = 3
"""Boards of a kind from which on there are others to be unlike."""
_MUCH = 0.05
_MADS = 3 * 1.4826
"""Times the median absolute deviation, which is 3 standard deviations where chance is Gaussian."""
_SHOWN = ("ttft_ms", "total_ms", "decode_tok_s", "peak_rss_mib", "ready_ms", "energy_per_answer_j")
_SAID = (*_SHOWN, "cold_ready_ms", "anonymous_mib")


def kinds(audits: Sequence[Named]) -> list[tuple[str, list[Named]]]:
    """Kinds of which there are at least FEWEST boards, each with a name: audits of the same board model, checkpoint and
    variants, about the same images.
    """
    found: dict[tuple[Any, ...], list[Named]] = {}
    for named in audits:
        work = named.audit.workload
        asked = tuple(sorted((name, image.sha256) for name, image in work.images.items()))
        key = (named.where, named.model, tuple(sorted(named.audit.variants)), asked, work.new_tokens, work.question)
        found.setdefault(key, []).append(named)
    return [
        (f"{len(boards)} × {where}: {model}, {', '.join(variants)}", boards)
        for (where, model, variants, *_), boards in found.items()
        if len(boards) >= FEWEST
    ]


def boards_table(boards: Sequence[Named]) -> Table:
    """A row for each board of one kind: figures of its first variant about the largest image, and what is unlike the
    others; those with most of it first.
    """
    said = {named.name: list(unlike(named, boards)) for named in boards}
    rows = []
    for named in sorted(boards, key=lambda named: (-len(said[named.name]), named.name)):
        figures = _shown(named.audit)
        cells = [_cell(figures[name]) if name in figures else NONE for name in _SHOWN]
        rows.append(Row([named.name, *cells, "; ".join(said[named.name]) or "–"], bool(said[named.name])))
    head = ["board", *(WORDS[name] for name in _SHOWN), "unlike the others"]
    return Table(head, rows, (len(head) - 1,)).without_empty()


def unlike(named: Named, boards: Sequence[Named]) -> Iterator[str]:
    """What is wrong with a board, or not as with most of its kind."""
    audit = named.audit
    yield from (reason.partition(";")[0] for reason in audit.verdict.reasons if reason.startswith("throttled"))
    broken = sorted({WORDS.get(limit.name, limit.name) for limit in audit.limits if not limit.holds})
    if broken:
        yield f"limits broken: {', '.join(broken)}"
    yield from _slower(audit, [other.audit for other in boards if other is not named])
    usual = [_versions(other.audit) for other in boards]
    for what, value in _versions(audit).items():
        (most, times), *_ = Counter(versions[what] for versions in usual).most_common(1)
        if value != most and times > len(boards) / 2:
            yield f"{what} {value}, most have {most}" if what not in _HASHES else f"other {what} than most have"
    if not audit.verdict.valid and not any(reason.startswith("throttled") for reason in audit.verdict.reasons):
        yield f"not valid: {audit.verdict.reasons[0].partition(':')[0] if audit.verdict.reasons else 'unknown'}"


def _slower(audit: Audit, others: Sequence[Audit]) -> Iterator[str]:
    """Figures whose whole interval is worse than the others' median, by more than these differ from each other."""
    theirs: dict[tuple[str, str, str], list[float]] = {}
    for other in others:
        for h in other.headlines():
            theirs.setdefault((h.variant, h.image, h.name), []).append(h.figure.median)
    worst: dict[str, float] = {}
    for h in audit.headlines():
        values = theirs.get((h.variant, h.image, h.name), [])
        if h.name not in _SAID or len(values) < FEWEST - 1:
            continue
        if (by := _worse_by(h, values)) > worst.get(h.name, 0.0):
            worst[h.name] = by
    if worst:
        figures = (f"{WORDS.get(name, name).partition(', ')[0]} by {by:.0%}" for name, by in worst.items())
        yield f"worse than the others: {', '.join(figures)}"


def _worse_by(headline: Headline, values: Sequence[float]) -> float:
    """By what share it is worse than the median of `values`; 0 where chance may be the reason."""
    median = statistics.median(values)
    mad = statistics.median(abs(value - median) for value in values)
    by = Change("", "", headline.name, Figure.of([median]), headline.figure).worse_by()
    figure = headline.figure
    low, high = (figure.min, figure.max) if figure.low is None or figure.high is None else (figure.low, figure.high)
    beyond = not low <= median <= high
    much = median and by > max(_MUCH, _MADS * mad / median)
    return by if beyond and much else 0.0


def _shown(audit: Audit) -> Mapping[str, Figure]:
    """Figures of the first variant, by name: those of an image are of the largest."""
    sizes = audit.workload.images
    largest = max(sizes, key=lambda name: sizes[name].width * sizes[name].height, default="")
    variant = next(iter(audit.variants))
    return {h.name: h.figure for h in audit.headlines() if h.variant == variant and h.image in ("", largest)}


def _cell(figure: Figure) -> str:
    return f"{figure.median:,.1f}" if figure.median < 100 else f"{figure.median:,.0f}"


_HASHES = ("weights", "settings")


def _versions(audit: Audit) -> dict[str, str]:
    """What should be the same on all boards of a kind."""
    return {
        "lfm-edge": audit.tool.version,
        "onnxruntime": str(audit.software.get("onnxruntime", "none")),
        "Python": str(audit.software.get("python", "none")),
        "kernel": str(audit.software.get("kernel", "none")),
        "profile": audit.profile.name,
        "settings": repr(sorted(audit.profile.settings.items(), key=str)),
        "weights": repr(sorted(audit.bundle.fingerprint.items())),
    }
