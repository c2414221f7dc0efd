"""`lfm-edge selftest`: check that a bundle works on this device."""

from __future__ import annotations

import argparse
from pathlib import Path

from lfm_profiles import VARIANTS
from lfm_runtime.commands.console import print_json

_WORKS = 3  # install.sh takes it for a warning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Check an installed bundle on this device. Exit code 0; 1: a check failed; 3: it works, but a budget is "
        "exceeded or the board is throttled."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--profile", default="", metavar="NAME", help="how to run: a name of lfm-edge profile list, or a .toml file"
    )
    parser.add_argument("--variant", choices=tuple(VARIANTS), help="variant to test (default: the profile's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--quiet", action="store_true", help="print only what fails, and the last line")


def run(options: argparse.Namespace) -> int:
    """Run and print every check; return 0 where none fails, 3 where only checks of the machine fail, else 1."""
    from dataclasses import asdict

    from lfm_runtime.errors import BundleError

    from lfm_audit.selftest import CHECKS, Installed, Result, selftest

    profile: str | None
    try:
        on = Installed(options.bundle, options.profile, options.variant)
        profile, outcomes = on.profile.name, selftest(on)
    except BundleError:
        damage = _damage(options.bundle)
        if not damage:
            raise
        profile, outcomes = None, iter([Result(CHECKS[0].name, "failed", damage, 0.0)])
    results = []
    for result in outcomes:
        results.append(result)
        if not options.json and not (options.quiet and result.outcome != "failed"):
            word = {"ok": "ok     ", "failed": "FAILED ", "skipped": "skipped"}[result.outcome]
            print(f"{word}  {result.name:18s} {result.seconds:6.1f} s  {result.said}", flush=True)
    failed = [result.name for result in results if result.outcome == "failed"]
    if options.json:
        print_json({"profile": profile, "failed": failed, "checks": [asdict(result) for result in results]})
    else:
        with_profile = f" (profile {profile})" if profile else ""  # a bundle that cannot be opened has none yet
        print(f"{'FAILED: ' + ', '.join(failed) if failed else 'all checks passed'}{with_profile}")
    if not failed:
        return 0
    return _WORKS if all(check.of_the_machine for check in CHECKS if check.name in failed) else 1


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a bundle; None where they are whole, or where there is none."""
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.errors import EdgeError
    from lfm_runtime.formats.files import holds_a_model

    try:
        if holds_a_model(folder):
            Bundle.open(folder).verify()
    except EdgeError as e:
        return str(e)
    return None
