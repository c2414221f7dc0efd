"""`lfm-edge compare`: compare two audits; the exit code says whether a figure got worse."""

from __future__ import annotations

import argparse
from pathlib import Path

from lfm_runtime.errors import SettingError

WORSE, INVALID = 1, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Compare two audits. Exit code 0; 3 an audit is not valid, or has too few samples to tell; 1 a figure is worse "
        "by more than --fail-over, beyond noise. 3 comes first, as in lfm-edge audit."
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--fail-over", default="5%", metavar="PERCENT", help="how much worse a figure's median may be (default 5%%)"
    )


def run(options: argparse.Namespace) -> int:
    """Compare two audits, print what changed and return the exit code."""
    from lfm_audit.compare import changes, differences
    from lfm_audit.reading import read_audit
    from lfm_audit.verdict import grouped

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
    for path, audit in ((options.before, before), (options.after, after)):
        if not audit.verdict.valid:
            print(f"NOT VALID {path}:")
            print("".join(f"  {reason}\n" for reason in grouped(audit.verdict.reasons)), end="")
    for difference in differences(before, after):
        print(f"differs: {difference}")
    worse = unknown = 0
    print(f"\n{'':32s} {'before':>10s} {'after':>10s} {'change':>8s}")
    for change in found:
        bad = change.worse_by() > allowed and change.beyond_noise
        worse += bad
        unknown += (
            change.worse_by() > allowed and change.too_few and change.name != "cold_ready_ms"
        )  # of which there are six at most
        word = "WORSE" if bad else change.word()
        ratio = "–" if change.ratio is None else f"{change.ratio - 1:+.1%}"
        name = " ".join(part for part in (change.variant, change.image, change.name) if part)
        print(f"{name:32s} {change.before.median:10,.1f} {change.after.median:10,.1f} {ratio:>8s}  {word}".rstrip())
    print(f"\n{worse} of {len(found)} figures are worse by more than {allowed:.1%}")
    if unknown:
        print(
            f"{unknown} more may be worse, but have too few samples to tell (six are needed): raise the audits' "
            "--budget"
        )
    if not (before.verdict.valid and after.verdict.valid):
        return INVALID
    return WORSE if worse else INVALID if unknown else 0
