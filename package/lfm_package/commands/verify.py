"""`lfm-edge verify`: check that a bundle is complete, unchanged and without other files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Check every file's hash, and that there are no unknown files and no weights outside the bundle, and "
        "that every graph loads; also what lfm-edge prepare wrote beside it, of which damaged graphs are removed. Exit "
        "code 0; 1: something is wrong; 2: there is no manifest that can be read."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--signers",
        type=Path,
        metavar="FILE",
        help="require a signature by one of these signers (a file like ssh's allowed_signers)",
    )
    parser.add_argument("--quiet", action="store_true", help="print problems alone, and no progress")
    parser.add_argument("--json", action="store_true", help='print one JSON object: {"problems": […]}')


def run(options: argparse.Namespace) -> int:
    """Print every problem of the bundle; return 1 where there is one, else 0."""
    from lfm_runtime.commands.console import print_json

    from lfm_package.verify import verify, verify_prepared

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty() and not options.quiet:
            print(f"\r\x1b[K{done / 1e6:,.0f} of {total / 1e6:,.0f} MB", end="", file=sys.stderr, flush=True)

    problems = verify(options.bundle, show, signers=options.signers)
    problems += verify_prepared(options.bundle) if not problems else []
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    if options.json:
        print_json({"bundle": str(options.bundle), "problems": problems})
        return 1 if problems else 0
    for problem in problems:
        print(problem)
    if options.quiet and not problems:
        return 0
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    print(f"{options.bundle}: {count}" if problems else f"{options.bundle} is complete and verified")
    return 1 if problems else 0
