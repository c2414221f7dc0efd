"""`lfm-edge compare`: compare two audits; the exit code says whether a figure got worse."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm_runtime.errors import SettingError

if TYPE_CHECKING:
    from lfm_audit.compare import Change
    from lfm_audit.result import Audit

WORSE, INVALID = 1, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Compare two audits. Exit code 0; 3 an audit is not valid, or has too few samples to tell; 1 a figure is worse "
        "by more than --fail-over, beyond noise. 3 comes first, as in lfm-edge audit."
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--fail-over", default="5%", metavar="PERCENT", help="how much worse a figure's median may be")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Compare two audits, print what changed and return the exit code."""
    from lfm_runtime.commands.console import print_json

    from lfm_audit.compare import changes, differences
    from lfm_audit.reading import read_audit

    try:
        allowed = float(options.fail_over.removesuffix("%")) / 100
    except ValueError as e:
        raise SettingError(f"--fail-over {options.fail_over} is not a percentage; write 5%") from e
    if not 0 <= allowed < float("inf"):
        raise SettingError(f"--fail-over {options.fail_over} is impossible; allowed: 0% and above")
    before, after = read_audit(options.before), read_audit(options.after)
    found = changes(before, after)
    if not found:
        raise SettingError(
            f"{options.before} and {options.after} have no figure in common; compare audits of the same variants and "
            "images"
        )
    worse = [change for change in found if change.worse_by() > allowed and change.beyond_noise]
    # Cold starts are six at most.
    unknown = [c for c in found if c.worse_by() > allowed and c.too_few and c.name != "cold_ready_ms"]
    audits = {str(options.before): before, str(options.after): after}
    if options.json:
        print_json(
            {
                "not_valid": {path: audit.verdict.reasons for path, audit in audits.items() if not audit.verdict.valid},
                "differences": differences(before, after),
                "changes": [_as_dict(change, worse=change in worse) for change in found],
                "worse": len(worse),
                "too_few_samples": len(unknown),
            }
        )
    else:
        _print(audits, differences(before, after), found, worse)
        print(f"\n{len(worse)} of {len(found)} figures are worse by more than {allowed:.1%}")
        if unknown:
            do = "raise the audits' --budget"
            print(f"{len(unknown)} more may be worse, but have too few samples to tell (six are needed): {do}")
    if not (before.verdict.valid and after.verdict.valid):
        return INVALID
    return WORSE if worse else INVALID if unknown else 0


def _as_dict(change: Change, *, worse: bool) -> dict[str, Any]:
    return {
        "variant": change.variant,
        "image": change.image,
        "figure": change.name,
        "before": change.before.median,
        "after": change.after.median,
        "ratio": change.ratio,
        "word": "worse beyond --fail-over" if worse else change.word(),
    }


def _print(
    audits: Mapping[str, Audit], others: Sequence[str], found: Sequence[Change], worse: Sequence[Change]
) -> None:
    from lfm_audit.verdict import grouped

    for path, audit in audits.items():
        if not audit.verdict.valid:
            print(f"NOT VALID {path}:")
            print("".join(f"  {reason}\n" for reason in grouped(audit.verdict.reasons)), end="")
    for difference in others:
        print(f"differs: {difference}")
    names = [" ".join(part for part in (change.variant, change.image, change.name) if part) for change in found]
    width = max(40, *map(len, names), 0)
    print(f"\n{'medians (audit shows the largest peak)':{width}s} {'before':>10s} {'after':>10s} {'change':>8s}")
    for name, change in zip(names, found, strict=True):
        word = "WORSE" if change in worse else change.word()
        ratio = "–" if change.ratio is None else f"{change.ratio - 1:+.1%}"
        print(
            f"{name:{width}s} {change.before.median:10,.1f} {change.after.median:10,.1f} {ratio:>8s}  {word}".rstrip()
        )
