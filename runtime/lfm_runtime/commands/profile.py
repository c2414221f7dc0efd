"""`lfm-edge profile`: show device profiles and this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lfm_runtime.commands.cli import add_setting_arguments, setting_flags
from lfm_runtime.commands.console import print_json
from lfm_runtime.errors import SettingError

if TYPE_CHECKING:
    from lfm_profiles import Device, Profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = "Device profiles: how to run on which device."
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "show", "validate", "detect"),
        help="list: the shipped profiles; show: the settings of one (default: what would run), with the flags below; "
        "validate: check profile files; detect: show this machine",
    )
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help="a profile's name or .toml file")
    parser.add_argument("--bundle", metavar="BUNDLE", help="show: with this bundle's own image settings")
    parser.add_argument("--json", action="store_true", help="list, show, detect: print JSON")
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Do the action named; raises SettingError for an argument that has no effect on it."""
    if options.action is None:
        raise SettingError("say what to show: lfm-edge profile list, show, validate or detect")
    flags = setting_flags(options)
    for name, given, where in (
        ("NAME", options.names, ("show", "validate")),
        ("--bundle", options.bundle, ("show",)),
        ("--json", options.json, ("list", "show", "detect")),
        ("a setting", flags, ("show",)),
    ):
        if given and options.action not in where:
            raise SettingError(f"{name} has no effect on profile {options.action}; leave it out")
    {"list": _list, "show": _show, "validate": _validate, "detect": _detect}[options.action](options)
    return 0


def _list(options: argparse.Namespace) -> None:
    from lfm_profiles import read
    from lfm_profiles.files import names

    from lfm_runtime.setup.profile import detected

    here = detected().profile.name
    shipped = [
        {"name": name, "description": read(name).description, "fits_this_machine": name == here} for name in names()
    ]
    if options.json:
        print_json({"profiles": shipped})
        return
    for each in shipped:
        print(f"{'*' if each['fits_this_machine'] else ' '} {each['name']:22s} {each['description']}")
    print(f"\n* fits this machine; show its settings with: lfm-edge profile show {here}")


def _show(options: argparse.Namespace) -> None:
    from pathlib import Path

    from lfm_profiles.schema import GENERATION_SETTINGS, IMAGE_SETTINGS, SETTINGS

    from lfm_runtime.bundle import Bundle
    from lfm_runtime.decode.sampling import GenerationSettings
    from lfm_runtime.images.layout import image_settings
    from lfm_runtime.setup.profile import default_name, find_profile, generation_changes, image_changes

    if len(options.names) > 1:
        raise SettingError("show takes one profile; name one")
    bundle = Bundle.open(Path(options.bundle)) if options.bundle else None
    profile = find_profile(*options.names or [default_name(bundle)], **setting_flags(options))
    values = {name: (getattr(profile, name), profile.origin.get(name, "default")) for name in SETTINGS}
    if bundle:
        images = image_settings(bundle.images, image_changes(profile, bundle.images))
        values |= {name: _with_origin(profile, name, getattr(images, name), "checkpoint") for name in IMAGE_SETTINGS}
        generation = bundle.generation.with_changes(generation_changes(profile, bundle.generation, verifies=True))
        usual = GenerationSettings()
        for name in (*GENERATION_SETTINGS, "temperature", "min_p", "top_k", "top_p", "repetition_penalty"):
            said = "default" if getattr(bundle.generation, name) == getattr(usual, name) else "checkpoint"
            values[name] = _with_origin(profile, name, getattr(generation, name), said)
        most = bundle.context_length
        values["context"] = _with_origin(profile, "context", min(profile.context or most, most), "checkpoint")
    budget = {name: value for name, value in vars(profile.budget).items() if value is not None}
    if options.json:
        settings = {name: {"value": value, "from": origin} for name, (value, origin) in values.items()}
        print_json({"name": profile.name, "description": profile.description, "settings": settings, "budget": budget})
        return
    print(f"{profile.name}: {profile.description}\n")
    for name, (value, origin) in values.items():
        print(f"{name:20s} {_shown(value):34s} {origin}")
    for name, value in budget.items():
        print(f"budget.{name:13s} {_shown(value):34s}")


def _with_origin(profile: Profile, name: str, value: Any, otherwise: str) -> tuple[Any, str]:
    """(value, where it came from); what a profile asks beyond the checkpoint is not taken."""
    who = profile.origin.get(name)
    if who is None:
        return value, otherwise
    asked = getattr(profile, name)
    return value, who if asked == value else f"checkpoint ({who}: {_shown(asked)})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _validate(options: argparse.Namespace) -> None:
    from lfm_runtime.setup.profile import find_profile

    if not options.names:
        raise SettingError("validate needs a file: lfm-edge profile validate FILE")
    wrong: list[SettingError] = []
    for name in options.names:
        try:
            found = find_profile(name)
        except SettingError as e:  # the other files are looked at as well
            wrong.append(e)
            if len(options.names) > 1:
                print(e)
            continue
        own = sorted(key for key, who in found.origin.items() if who == found.name)
        budget = ", ".join(f"{key} {value:g}" for key, value in vars(found.budget).items() if value is not None)
        print(f"{name}: sets {', '.join(own) or 'nothing'}{f'; budget {budget}' if budget else ''}")
    if len(options.names) > 1 and wrong:
        raise SettingError(f"{len(wrong)} of {len(options.names)} files cannot be used")
    if wrong:
        raise wrong[0]


def _detect(options: argparse.Namespace) -> None:
    from lfm_runtime.setup.machine import this_machine
    from lfm_runtime.setup.profile import VARIABLE, detected, find_profile

    device, choice, holds = this_machine().device, detected(), find_profile()
    if options.json:
        print_json({"device": device.as_dict(), "profile": holds.name, "reasons": choice.reasons})
        return
    for name, value in device_lines(device):
        print(f"{name:10s} {value}")
    print(f"\nprofile    {choice.profile.name}: {', '.join(choice.reasons)}")
    if holds.name != choice.profile.name:
        print(f"           {VARIABLE} is set to {holds.name}, which is used instead")


def device_lines(device: Device) -> list[tuple[str, str]]:
    """Return (name, text) of each fact about a machine, "not known" where nothing tells."""
    cores = " + ".join(
        f"{core.count} × {core.name or device.cpu or 'core'}{f' {core.max_mhz} MHz' if core.max_mhz else ''}"
        for core in device.cores
    )
    memory = f"{device.ram_total_mib} MiB, {device.ram_available_mib} available" if device.ram_total_mib else None
    limit = f"{device.limit_mib} MiB by {device.limit_by}, {device.limit_free_mib} free" if device.limit_mib else "none"
    caches = ", ".join(f"{name} {size} KiB" for name, size in device.caches.items())
    userland = (
        f"{device.system} {device.machine}, {device.pointer_bits}-bit Python, pages of {device.page_size // 1024} KiB"
    )
    if device.pointer_bits == 32:
        userland += " (there are no wheels of onnxruntime, numpy and pillow for 32-bit Arm: install a 64-bit system)"
    throttled = None if device.throttled is None else ", ".join(device.throttled) or "no"
    facts = [
        ("board", device.board),
        ("soc", device.soc),
        ("cores", cores),
        ("features", ", ".join(device.features)),
        ("caches", caches),
        ("memory", memory),
        ("limit", limit),
        ("system", userland),
        ("gpu", device.gpu),
        ("jetpack", device.jetpack),
        ("governor", device.governor),
        ("throttled", throttled),
    ]
    return [(name, value or "not known") for name, value in facts]
