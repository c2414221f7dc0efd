"""`lfm-edge unpack`: unpack and verify a packed bundle."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Unpack a file made by lfm-edge pack. Every byte is verified; if anything is wrong, nothing is written."
    )
    parser.add_argument(
        "archive", type=Path, metavar="NAME.tar", help="parts NAME.tar.000, NAME.tar.001 … are read as one"
    )
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument(
        "--signers",
        type=Path,
        metavar="FILE",
        help="require a signature by one of these signers (a file like ssh's allowed_signers)",
    )


def run(options: argparse.Namespace) -> int:
    """Unpack the archive, print the folder and return 0."""
    from lfm_runtime.formats.manifest import PROFILE

    from lfm_package.unpack import unpack

    unpack(options.archive, options.output, signers=options.signers)
    print(f"{options.output} is complete and verified")
    if (options.output / PROFILE).is_file():
        print(f"it runs by the profile that was packed with it, {options.output / PROFILE}; by another: --profile NAME")
    return 0
