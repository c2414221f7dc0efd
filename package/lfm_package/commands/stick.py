"""`lfm-edge stick`: write a USB stick: wheels, one variant of a bundle, install.sh."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lfm_runtime.commands.console import print_json

from lfm_package.commands.pack import add_packing_arguments, chosen_contents
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


def _wishes(folder: Path, packed: Sequence[str], profiles: Sequence[str]) -> str:
    """What devices of this kind that choose another profile would use as well; "" where they miss nothing."""
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.setup.profile import find_profile
    from lfm_runtime.setup.variants import choose_variants

    bundle = Bundle.open(folder)
    missed = {name: choose_variants(bundle.variants, find_profile(name))[1] for name in profiles}
    missed = {name: prefill for name, prefill in missed.items() if prefill and prefill not in packed}
    if not missed:
        return ""
    prefill = next(iter(missed.values()))
    return f"{' and '.join(missed)} would also use {prefill} for the prefill; pack it with --prefill {prefill}"


def run(options: argparse.Namespace) -> int:
    """Write the stick, print its size and the command to run on the device, and return 0."""
    from lfm_package.pack import Extras
    from lfm_package.signature import check_key
    from lfm_package.stick import check_place, check_profile, write_stick
    from lfm_package.targets import Platform

    platform = Platform.of(options.target, options.python)
    if options.sign:
        check_key(options.sign)
    check_place(options.output, platform, signed=bool(options.sign), force=options.force)
    contents = chosen_contents(options, platform.target.profile)
    if contents.profile:
        check_profile(contents.profile, platform)
    elif wish := _wishes(options.bundle, contents.variants, platform.target.others):
        print(f"  {wish}", file=sys.stderr if options.json else sys.stdout)
    extras = Extras(contents.profile, (), options.sign, contents.golden, with_extras=tuple(options.extra))
    wheels = write_stick(options.bundle, contents.variants, platform, options.output, extras, force=options.force)
    files = (
        [options.output] if options.output.is_file() else [path for path in options.output.rglob("*") if path.is_file()]
    )
    size = sum(path.stat().st_size for path in files)
    if options.json:
        wheel_bytes = sum(wheel.size for wheel in wheels)
        found = {"output": str(options.output), "bytes": size, "wheel_bytes": wheel_bytes, "target": str(platform)}
        print_json({**found, "variants": contents.variants})
        return 0
    print(
        f"{options.output}: {size / 1e6:.1f} MB, of which {sum(wheel.size for wheel in wheels) / 1e6:.1f} MB are "
        f"wheels, for {platform}"
    )
    install = f"sh {shlex.quote(options.output.name.removesuffix('.tar') + '/install.sh')}"
    first = f"tar xf {shlex.quote(options.output.name)} && " if options.output.is_file() else ""
    print(f"on the device: {first}{install}")
    return 0
