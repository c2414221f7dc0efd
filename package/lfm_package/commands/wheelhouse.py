"""`lfm-edge wheelhouse`: download the runtime's wheels for another machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from lfm_runtime.installation import STICK_EXTRAS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Fetch what lfm-edge's runtime needs on a board, for its processor, Python and C library. There, without "
        "network: "
        "pip install --no-index --find-links DIR --require-hashes -r DIR/requirements.txt"
    )
    add_target_arguments(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR")


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `wheelhouse`, `stick` and `make` share: board, Python, extras."""
    names = "pi5, pi4, pi3, pi-zero2w, jetson-jp6, jetson-jp7, aarch64, x86_64"
    parser.add_argument("--target", required=True, metavar="NAME", help=f"the board: {names}")
    parser.add_argument(
        "--python",
        default="",
        metavar="X.Y",
        help="Python version of the board, if its system is not the newest release: 3.11 on bookworm",
    )
    parser.add_argument(
        "--extra",
        action="append",
        default=[],
        choices=STICK_EXTRAS,
        help="what else the board does: lfm-edge serve, answers by a schema, cameras, MQTT, Dask workers; repeatable",
    )


def run(options: argparse.Namespace) -> int:
    """Fetch the wheels, print each with its size and return 0."""
    from lfm_package.targets import Platform
    from lfm_package.wheelhouse import wheelhouse

    platform = Platform.of(options.target, options.python)
    wheels = wheelhouse(platform, options.output, options.extra)
    print(platform)
    for wheel in wheels:
        print(f"  {wheel.name:14s} {wheel.version!s:10s} {wheel.size / 1e6:6.1f} MB")
    size, unpacked = sum(wheel.size for wheel in wheels) / 1e6, sum(wheel.unpacked for wheel in wheels) / 1e6
    print(f"{options.output}: {len(wheels)} wheels, {size:.1f} MB; unpacked {unpacked:.0f} MB")
    return 0
