"""`lfm-edge pack`: pack one variant of a bundle into one file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lfm_profiles import VARIANTS, Profile

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Pack one variant of a bundle into a .tar: only its files, manifest, SHA256SUMS, licence and model card. "
        "Also writes the .tar's SHA-256 and a CycloneDX bill of materials. The same inputs give the same bytes. "
        "On the device: lfm-edge unpack NAME.tar -o FOLDER."
    )
    parser.add_argument("bundle", type=Path)
    add_packing_arguments(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="NAME.tar")
    parser.add_argument(
        "--wheelhouse", type=Path, metavar="FOLDER", help="wheelhouse whose wheels are listed in the bill of materials"
    )
    parser.add_argument(
        "--split", default="0", metavar="SIZE", help="write parts of at most SIZE: 4G for FAT; unpack joins them"
    )


def add_packing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `pack` and `stick` share: variants, profile, signing key."""
    parser.add_argument("--variant", required=True, choices=tuple(VARIANTS))
    parser.add_argument(
        "--prefill", choices=tuple(VARIANTS), metavar="VARIANT", help="also pack this variant, for prefill"
    )
    parser.add_argument("--profile", default="", metavar="NAME", help="pack this profile as well, as profile.toml")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign with this SSH key (ssh-keygen -Y)")


def packed_variants(options: argparse.Namespace) -> list[str]:
    """Return the variants to pack; raises SettingError where --prefill names the same as --variant."""
    from lfm_runtime.errors import SettingError

    if options.prefill == options.variant:
        raise SettingError(
            f"--prefill {options.prefill} has no effect beside the variant {options.variant}; leave it out"
        )
    return [options.variant, *([options.prefill] if options.prefill else [])]


def packed_profile(options: argparse.Namespace) -> Profile | None:
    """The profile named, with the variants that are packed: the device runs what was meant."""
    from lfm_runtime.setup.profile import find_profile

    if not options.profile:
        return None
    return find_profile(options.profile, variant=options.variant, prefill=options.prefill)


def run(options: argparse.Namespace) -> int:
    """Pack the bundle, print each file written with its size and return 0."""
    from lfm_runtime.errors import SettingError

    from lfm_package.pack import Extras, pack
    from lfm_package.wheelhouse import read_wheelhouse

    found = re.fullmatch(r"(\d+)([kMG]?)", options.split)
    split = int(found[1]) * _UNITS[found[2]] if found else -1
    if split < 0 or 0 < split < 10**6:
        raise SettingError(f"--split {options.split} is impossible; write 4G or 700M, 1M at least")
    profile = packed_profile(options)
    wheels = read_wheelhouse(options.wheelhouse) if options.wheelhouse else []
    for path in pack(
        options.bundle, packed_variants(options), options.output, Extras(profile, wheels, options.sign, split)
    ):
        print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    return 0
