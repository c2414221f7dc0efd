"""`lfm-edge stick`: write a USB stick: wheels, one variant of a bundle, install.sh."""

from __future__ import annotations

import argparse
from pathlib import Path

from lfm_package.commands.pack import add_packing_arguments, packed_profile, packed_variants
from lfm_package.commands.wheelhouse import add_target_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Write a stick: wheels for a board, one variant of a bundle, a profile, install.sh. On the board, without "
        "network or root: "
        "sh STICK/install.sh"
    )
    parser.add_argument("bundle", type=Path)
    add_target_arguments(parser)
    add_packing_arguments(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER", help="or NAME.tar")


def run(options: argparse.Namespace) -> int:
    """Write the stick, print its size and the command to run on the device, and return 0."""
    from lfm_package.stick import write_stick
    from lfm_package.targets import Platform

    platform = Platform.of(options.target, options.python)
    profile = packed_profile(options)
    wheels = write_stick(
        options.bundle, packed_variants(options), platform, options.output, profile=profile, sign_with=options.sign
    )
    files = (
        [options.output] if options.output.is_file() else [path for path in options.output.rglob("*") if path.is_file()]
    )
    size = sum(path.stat().st_size for path in files)
    print(
        f"{options.output}: {size / 1e6:.1f} MB, of which {sum(wheel.size for wheel in wheels) / 1e6:.1f} MB are "
        f"wheels, for {platform}"
    )
    print(f"on the device: sh {options.output.name.removesuffix('.tar')}/install.sh")
    return 0
