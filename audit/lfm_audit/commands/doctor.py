"""`lfm-edge doctor`: check this machine, and say how to fix problems."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = "Check this machine, and say how to fix problems. Exit code 0; 1: there is a problem."
    parser.add_argument(
        "bundle", type=Path, nargs="?", help="also check whether this bundle fits this machine and is prepared for it"
    )
    parser.add_argument(
        "--profile", default="", metavar="NAME", help="how it is run: a name of lfm-edge profile list, or a .toml file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(options: argparse.Namespace) -> int:
    """Print every finding, as text or as one JSON object; return 1 where one is a problem, else 0."""
    from dataclasses import asdict

    from lfm_runtime.commands.console import print_json

    from lfm_audit.doctor.examine import examine
    from lfm_audit.doctor.finding import Machine

    findings = []
    for finding in examine(Machine.here(options.bundle, options.profile)):
        findings.append(finding)
        if not options.json:
            print(f"{finding.state:8s} {finding.name:12s} {finding.said}", flush=True)
            if finding.fix:
                print(f"{'':21s} → {finding.fix}", flush=True)
    counts = {state: sum(finding.state == state for finding in findings) for state in ("problem", "warning", "ok")}
    if options.json:
        print_json({**counts, "findings": [asdict(finding) for finding in findings]})
    else:
        print(f"problems: {counts['problem']}, warnings: {counts['warning']}, ok: {counts['ok']}")
    return 1 if counts["problem"] else 0
