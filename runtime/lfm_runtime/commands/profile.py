"""`lfm-edge profile`: show profiles, this machine, and what a run will cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lfm_runtime.commands.cli import add_setting_arguments, setting_flags
from lfm_runtime.commands.console import print_json
from lfm_runtime.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lfm_profiles import Device

    from lfm_runtime.setup.costs import Costs
    from lfm_runtime.setup.forecast import Forecast
    from lfm_runtime.setup.setup import Setup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = "Device profiles: how to run on which device."
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "show", "validate", "detect", "plan"),
        help="list: the shipped profiles; show: the settings of one (default: this machine's); validate: check "
        "profile files; detect: show this machine; plan: tokens, memory and disk of a run of BUNDLE [IMAGE …]",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a profile's name or .toml file; plan: the bundle and images"
    )
    parser.add_argument("--profile", default="", metavar="NAME", help="plan: with this profile")
    parser.add_argument("-p", "--prompt", default="", metavar="QUESTION", help="plan: for this question")
    parser.add_argument("--bundle", metavar="BUNDLE", help="show: with this bundle's own image settings")
    parser.add_argument("--json", action="store_true", help="detect, show, plan: print one JSON object")
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Do the action named; raises SettingError for an argument that has no effect on it."""
    if options.action is None:
        raise SettingError("say what to show: lfm-edge profile list, show, validate, detect or plan")
    flags = setting_flags(options)
    for name, given, where in (
        ("NAME", options.names, ("show", "validate", "plan")),
        ("--bundle", options.bundle, ("show",)),
        ("--json", options.json, ("show", "detect", "plan")),
        ("--profile", options.profile, ("plan",)),
        ("--prompt", options.prompt, ("plan",)),
        ("a setting", flags, ("show", "plan")),
    ):
        if given and options.action not in where:
            raise SettingError(f"{name} has no effect on profile {options.action}; leave it out")
    {"list": _list, "show": _show, "validate": _validate, "detect": _detect, "plan": _plan}[options.action](options)
    return 0


def _list(_: argparse.Namespace) -> None:
    from lfm_profiles import read
    from lfm_profiles.files import names

    from lfm_runtime.setup.profile import detected

    here = detected().profile.name
    for name in names():
        print(f"{'*' if name == here else ' '} {name:22s} {read(name).description}")
    print(f"\n* fits this machine; show its settings with: lfm-edge profile show {here}")


def _show(options: argparse.Namespace) -> None:
    from pathlib import Path

    from lfm_profiles.schema import IMAGE_SETTINGS, SETTINGS

    from lfm_runtime.bundle import Bundle
    from lfm_runtime.images.layout import image_settings
    from lfm_runtime.setup.profile import find_profile, image_changes

    if len(options.names) > 1:
        raise SettingError("show takes one profile; name one")
    profile = find_profile(*options.names, **setting_flags(options))
    values = {name: (getattr(profile, name), profile.origin.get(name, "default")) for name in SETTINGS}
    if options.bundle:
        bundle = Bundle.open(Path(options.bundle))
        images = image_settings(bundle.images, image_changes(profile, bundle.images))
        values |= {name: (getattr(images, name), profile.origin.get(name, "checkpoint")) for name in IMAGE_SETTINGS}
        most = bundle.context_length
        values["context"] = min(profile.context or most, most), profile.origin.get("context", "checkpoint")
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
        print(f"{name}: sets {', '.join(own) or 'nothing'}")
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


def _plan(options: argparse.Namespace) -> None:
    from lfm_runtime.images.pixels import image_size
    from lfm_runtime.model import Model  # noqa: F401  (what the process has once it is loaded is part of the forecast)
    from lfm_runtime.setup.costs import find_costs
    from lfm_runtime.setup.resolve import resolve
    from lfm_runtime.setup.setup import Ask

    if not options.names:
        raise SettingError("plan needs a bundle: lfm-edge profile plan BUNDLE [IMAGE …]")
    folder, *images = options.names
    ask = Ask(tuple(image_size(name) for name in images), options.prompt)
    setup = resolve(folder, options.profile, ask, **setting_flags(options))
    if setup.forecast is None:
        raise SettingError(
            f"{folder}: config.json does not have the model's sizes, which a plan needs; copy it from the checkpoint"
        )
    costs = find_costs(
        setup.bundle, setup.variant, setup.prefill, setup.execution.threads, low_memory=setup.execution.low_memory
    )
    if options.json:
        times = setup.forecast.times_ms(costs, low_memory=setup.execution.low_memory) if costs else None
        print_json({**setup.as_dict(), "times_ms": times})
        return
    for name, value in (*_forecast_rows(setup, setup.forecast, images), *_times(setup, setup.forecast, costs)):
        print(f"{name:10s} {value}")
    for step in setup.steps:
        print(f"{'to fit':10s} {step}")


def _forecast_rows(setup: Setup, forecast: Forecast, images: Sequence[str]) -> Iterator[tuple[str, str]]:
    reads = f", prefill {setup.prefill}" if setup.prefill else ""
    low = ", one graph at a time" if setup.execution.low_memory else ""
    yield "profile", f"{setup.profile.name}: {setup.variant}{reads}{low}"
    for name, image in zip(images, forecast.images, strict=True):
        thumbnail = " and a thumbnail" if image.thumbnail else ""
        tiles = f"{image.columns} × {image.rows} tiles{thumbnail}" if image.tiled else "one view"
        yield "image", f"{name}: {image.width}×{image.height}, {tiles}, {image.tokens} tokens"
    tokens = f"{forecast.prompt_tokens} prompt ({forecast.image_tokens} image)"
    yield "tokens", f"{tokens}, an answer of at most {forecast.new_tokens}"
    memory = forecast.memory
    parts = f"{memory.anonymous:.0f} anonymous, {memory.mapped:.0f} mapped files"
    free = "free memory is unknown" if setup.free_mib is None else f"{setup.free_mib:,} MiB are free"
    yield "memory", f"{memory.peak:,.0f} MiB at the peak ({parts}); {free}"
    yield "disk", f"{forecast.disk_mib:,.0f} MiB of weights"


def _times(setup: Setup, forecast: Forecast, costs: Costs | None) -> Iterator[tuple[str, str]]:
    if costs is None:
        advice = f"lfm-edge audit {setup.bundle.folder}"
        yield "time", f"unknown until this variant is audited on this machine: {advice}"
        return
    times = forecast.times_ms(costs, low_memory=setup.execution.low_memory)
    stages = ", ".join(f"{name} {ms:,.0f}" for name, ms in times.items() if name != "per_token")
    unfair = "" if costs.valid else ", which was not valid"
    yield "time", f"{stages} ms; then {times['per_token']:.1f} ms a token, as the last audit here measured{unfair}"
    budget, rate = setup.profile.budget, 1e3 / times["per_token"]
    if budget.ttft_ms is not None and times["ttft"] > budget.ttft_ms:
        yield "budget", f"ttft_ms {budget.ttft_ms:g} is exceeded: {times['ttft']:,.0f}"
    if budget.decode_tok_s is not None and rate < budget.decode_tok_s:
        yield "budget", f"decode_tok_s {budget.decode_tok_s:g} is not reached: {rate:,.1f}"


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
