"""`lfm-edge tune`: find the best settings for this machine by measuring, and write a profile."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from lfm_runtime.commands.cli import (
    EXIT_INTERRUPTED,
    add_force_argument,
    add_setting_arguments,
    interrupt_on_termination,
    setting_flags,
)
from lfm_runtime.errors import SettingError, command, counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Measure which settings suit BUNDLE and images like IMAGE on this machine, and write them as a profile. "
        "Settings given by flags are not varied. Run again with the same -o to continue."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="sample images, like those of later questions"
    )
    parser.add_argument(
        "--profile",
        default="",
        metavar="NAME",
        help="starting profile: a name of lfm-edge profile list, or a .toml file",
    )
    parser.add_argument("-p", "--prompt", default="Describe this image.", metavar="QUESTION")
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="minutes to measure")
    parser.add_argument(
        "--objective", choices=("latency", "memory", "energy"), default="latency", help="what to optimize"
    )
    parser.add_argument(
        "--floor", type=float, metavar="KL", help="highest KL divergence to the best variant, nats (default 0.1)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("tuned.toml"), metavar="FILE", help="profile to write"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_force_argument(parser)
    add_setting_arguments(parser)


def _check(options: argparse.Namespace) -> None:
    """Raise SettingError for what cannot be."""
    if not 0 <= options.minutes <= 1e5:
        raise SettingError(
            f"minutes {options.minutes:g} is impossible; allowed: 0 (choose from what was measured before) and above"
        )
    if options.floor is not None and not 0 < options.floor < float("inf"):
        raise SettingError(f"--floor {options.floor:g} is impossible; allowed: a KL divergence above 0, such as 0.1")
    if not options.prompt.strip():
        raise SettingError('the question is empty; write one: -p "Describe this image."')
    if options.output.suffix != ".toml":
        raise SettingError(f"{options.output} cannot be written as a profile; name a .toml file")


def run(options: argparse.Namespace) -> int:
    """Search until the time is over, print the front, write the profile and return 0."""
    from lfm_profiles import to_toml
    from lfm_profiles.sensors import Sensors
    from lfm_runtime.bundle import Bundle
    from lfm_runtime.commands.console import status_line
    from lfm_runtime.engine.gpu_wheel import CUDA
    from lfm_runtime.engine.prepared import tell_of_damage
    from lfm_runtime.formats.files import check_output, is_sealed, sealed, write_or_rescue
    from lfm_runtime.images.pixels import image_size
    from lfm_runtime.setup.machine import this_machine
    from lfm_runtime.setup.resolve import resolve

    from lfm_audit.tune.result import is_tuning
    from lfm_audit.tune.search import axes_of, tune
    from lfm_audit.tune.tuning import FLOOR, Tuning

    _check(options)
    output: Path = options.output
    kept = output.with_suffix(".json")
    check_output(output, "lfm-edge tune", is_sealed, force=options.force)
    check_output(kept, "lfm-edge tune", is_tuning, force=None)
    for image in options.images:
        image_size(image)  # better now than in the first process
    bundle, device = Bundle.open(options.bundle), this_machine().device
    tell_of_damage(bundle)
    profile = resolve(bundle, options.profile, force=True, **setting_flags(options)).profile
    if CUDA in profile.providers:
        raise SettingError(
            f"tune works only for CPUs, but profile {profile.name} uses a GPU; choose another: --profile generic"
        )
    tuning = Tuning(
        bundle,
        profile,
        options.images,
        options.prompt,
        options.objective,
        FLOOR if options.floor is None else options.floor,
        axes_of(bundle, profile, options.images),
    )
    if tuning.resume(kept):
        print(f"continuing with {counted(len(tuning.points), 'point')} from {kept}", file=sys.stderr)
    if options.minutes == 0 and not tuning.front():
        raise SettingError(f"nothing was measured before, so there is nothing to choose from in {kept}; give --minutes")
    interrupt_on_termination()
    progress = status_line(quiet=options.quiet)
    whole = tune(tuning, device, minutes=options.minutes, kept=kept, sensors=Sensors(), progress=progress)
    progress("")
    print(tuning.summary())
    chosen = tuning.chosen()
    best = tuning.points[chosen]
    where, day = device.board or device.cpu or device.machine, time.strftime("%Y-%m-%d")
    said = f"Tuned for {tuning.objective} on {where}, {day}: answers in {best.latency:.0f} ms, {best.peak_mib:.0f} MiB"
    write_or_rescue(output, sealed(to_toml(tuning.profile_of(chosen, said)), "lfm-edge tune"))
    use, plot = shlex.quote(str(output)), command("report", kept)
    print(f"\nwritten: {output}; use it with --profile {use}. Measurements: {kept}; plot: {plot}")
    if not whole:
        print("lfm-edge: interrupted; chosen from what is known so far. The same command goes on", file=sys.stderr)
    return 0 if whole else EXIT_INTERRUPTED
