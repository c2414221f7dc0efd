"""`lfm-edge pack`: pack one variant of a bundle into one file."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lfm_profiles import VARIANTS, Profile
from lfm_runtime.commands.cli import add_force_argument
from lfm_runtime.commands.console import print_json
from lfm_runtime.errors import command, counted

if TYPE_CHECKING:
    from lfm_runtime.bundle import Bundle

_ANY_CPU = "generic"
"""A profile that lists variants as those of all processors do: what a device chooses that is not known."""
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Pack one variant of a bundle into a .tar: only its files, manifest, SHA256SUMS, licence and model card. "
        "Also writes the .tar's SHA-256 and a CycloneDX bill of materials. The same inputs give the same bytes. "
        "On the device: lfm-edge unpack NAME.tar -o FOLDER. Name --variant or --profile."
    )
    parser.add_argument("bundle", type=Path)
    add_packing_arguments(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="NAME.tar")
    parser.add_argument(
        "--wheelhouse", type=Path, metavar="FOLDER", help="wheelhouse whose wheels are listed in the bill of materials"
    )
    parser.add_argument("--split", metavar="SIZE", help="write parts of at most SIZE: 4G for FAT; unpack joins them")


def add_packing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `pack` and `stick` share: variants, profile, signing key."""
    parser.add_argument("--variant", choices=tuple(VARIANTS), help="default: the one that the profile chooses")
    parser.add_argument(
        "--prefill",
        choices=("none", *VARIANTS),
        metavar="VARIANT",
        help="also pack this variant, for prefill; default: the one that the profile chooses",
    )
    parser.add_argument(
        "--profile", default="", metavar="NAME", help="pack this profile as well; run takes it then by default"
    )
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign with this SSH key (ssh-keygen -Y)")
    parser.add_argument(
        "--golden",
        type=Path,
        metavar="FILE.jsonl",
        help="pack these questions {image, question} with their images and answers; selftest asks them on the device",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; what the profile changes on stderr")
    add_force_argument(parser)


@dataclass(frozen=True)
class Contents:
    """What is packed: variants, the first being the default of the device, and a profile if one was named."""

    variants: list[str]
    profile: Profile | None
    golden: Mapping[str, Path | bytes]


def chosen_contents(options: argparse.Namespace, board: str = "") -> Contents:
    """What the flags say, and where they say nothing, what the profile comes to with this bundle: the one named, else
    `board`'s. Prints what the profile changes of the checkpoint's settings, and what it misses.

    Raises:
        SettingError: neither a variant nor a profile is named, or a flag has no effect.
    """
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.errors import SettingError
    from lfm_runtime.setup.judged import judged_otherwise
    from lfm_runtime.setup.profile import departures, find_profile
    from lfm_runtime.setup.variants import choose_variants, made_with, unmet

    name = options.profile or board
    bundle = Bundle.open(options.bundle)
    out = sys.stderr if options.json else sys.stdout
    _tell_left_out(options, bundle, out)
    if not name and not options.variant:
        raise SettingError("name --variant, or the profile of the device: --profile pi5")
    profile = find_profile(name or _ANY_CPU, variant=options.variant, prefill=options.prefill)
    variant, prefill = choose_variants(bundle.variants, profile)
    variants = [variant, *([prefill] if prefill else [])]
    by_itself = choose_variants(variants, find_profile(name or _ANY_CPU))  # what the device will come to with these
    if not name:
        if by_itself[0] != variant:
            said = f"a device that finds {' and '.join(variants)} runs {by_itself[0]} unless a profile says otherwise"
            raise SettingError(f"{said}; pack the device's as well: --profile pi5")
        golden = _golden(options, find_profile("", variant=variant, prefill=prefill or "none"))
        return Contents(variants, None, golden)
    print(f"profile {profile.name}: {variant}" + (f", {prefill} for the prefill" if prefill else ""), file=out)
    if changes := departures(profile, bundle.images, bundle.generation):
        print(f"  it changes the checkpoint's settings: {', '.join(changes)}", file=out)
    quality = bundle.manifest.quality.get(variant, {}) if bundle.manifest else {}
    if "kl" in quality and (how := judged_otherwise(quality, prefill, departures(profile, bundle.images))):
        again = command("quality", options.bundle, "--variant", variant, "--profile", name, "--images", "PHOTOS")
        here = f"; as here: {again}" if quality.get("against") in bundle.variants else ""
        print(f"  the bundle knows {variant}'s loss as measured otherwise, {how}{here}", file=out)
    for wish in unmet(bundle, profile):
        print(f"  it would also use {wish}, which the bundle lacks: {made_with(bundle, wish)}", file=out)
    packed = find_profile(name, variant=variant, prefill=prefill)
    golden = _golden(options, find_profile(packed, prefill=prefill or "none"))  # of what is packed alone
    goes_along = bool(options.profile) or by_itself != (variant, prefill)
    if goes_along and not options.profile:
        print("  it is packed too: by itself, the board would choose others of these variants", file=out)
    return Contents(variants, packed if goes_along else None, golden)


def _tell_left_out(options: argparse.Namespace, bundle: Bundle, out: TextIO) -> None:
    """What an unpacked bundle has of its pack's maker is packed again only where it is named."""
    from lfm_runtime.formats.manifest import PROFILE
    from lfm_runtime.questions import GOLDEN_QUESTIONS

    if PROFILE in bundle.files and not options.profile:
        place = bundle.folder / PROFILE
        print(f"  the bundle's own profile is left out; to pack it: --profile {place}", file=out)
    if GOLDEN_QUESTIONS in bundle.files and options.golden is None:
        print("  the bundle's golden questions are left out; to pack them: --golden FILE.jsonl", file=out)


def _golden(options: argparse.Namespace, profile: Profile) -> Mapping[str, Path | bytes]:
    """The golden set as this machine answers it with the profile's variants and image settings."""
    if options.golden is None:
        return {}
    from lfm_profiles import default_threads
    from lfm_runtime.model import Model
    from lfm_runtime.questions import GOLDEN_QUESTIONS, read_jsonl, record
    from lfm_runtime.setup.profile import on_this_machine

    questions = read_jsonl(options.golden, [options.golden.parent])
    model = Model.load(options.bundle, profile=on_this_machine(profile), threads=default_threads(), prepared=False)
    golden, images = record(model, questions)
    asked = f"{counted(len(questions), 'question')} about {counted(len(images), 'image')}"
    said = f"golden set: {asked}, answered by {model.setup.summary}"
    print(said, file=sys.stderr if options.json else sys.stdout)
    return {GOLDEN_QUESTIONS: golden.to_text().encode(), **images}


def run(options: argparse.Namespace) -> int:
    """Pack the bundle, print each file written with its size and return 0."""
    from lfm_runtime.errors import SettingError

    from lfm_package.pack import Extras, check_place, pack
    from lfm_package.signature import check_key
    from lfm_package.wheelhouse import read_wheelhouse

    found = re.fullmatch(r"(\d+)([kMG]?)", options.split or "")
    split = int(found[1]) * _UNITS[found[2]] if found else 0
    if options.split is not None and split < 10**6:
        raise SettingError(f"--split {options.split} is impossible; write 4G or 700M, 1M at least")
    check_place(options.output, signed=bool(options.sign), force=options.force)
    if options.sign:
        check_key(options.sign)
    contents = chosen_contents(options)
    wheels = read_wheelhouse(options.wheelhouse) if options.wheelhouse else []
    extras = Extras(contents.profile, wheels, options.sign, contents.golden, split)
    written = pack(options.bundle, contents.variants, options.output, extras)
    if options.json:
        files = [{"path": str(path), "bytes": path.stat().st_size} for path in written]
        print_json({"variants": contents.variants, "files": files})
        return 0
    for path in written:
        size = path.stat().st_size
        print(f"{path}  {size / 1e6:,.1f} MB" if size >= 1e5 else f"{path}  {size / 1e3:,.1f} kB")
    return 0
