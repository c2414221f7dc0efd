"""`lfm-edge plan`: say what a run will take here, in tokens, memory, disk and time; nothing is loaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lfm_runtime.commands.cli import add_setting_arguments, bundle_of, check_images, setting_flags
from lfm_runtime.commands.console import print_json
from lfm_runtime.errors import BundleError, SettingError, command

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lfm_runtime.setup.costs import Costs
    from lfm_runtime.setup.forecast import Forecast
    from lfm_runtime.setup.roofline import Range
    from lfm_runtime.setup.setup import Setup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Say what a run will take on this machine: tiles, tokens, memory and disk; and the time, once `lfm-edge audit` "
        "has measured the variant here. With a board's --profile, also the time foreseen on it, a range that nobody "
        "measured. Nothing is loaded."
    )
    parser.add_argument(
        "bundle", help="folder made by lfm-edge export, a hub repository's ONNX files, or its id: owner/name[@revision]"
    )
    parser.add_argument("images", nargs="*", default=[], metavar="IMAGE", help="image files")
    parser.add_argument(
        "--profile", default="", metavar="NAME", help="how to run: a name of lfm-edge profile list, or a .toml file"
    )
    parser.add_argument("-p", "--prompt", default="", metavar="QUESTION", help="the question")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print the plan, or one JSON object, and return 0."""
    from lfm_runtime.images.pixels import image_size
    from lfm_runtime.model import Model  # noqa: F401  (what the process has once it is loaded is part of the forecast)
    from lfm_runtime.setup.costs import find_costs
    from lfm_runtime.setup.profile import detected
    from lfm_runtime.setup.resolve import resolve
    from lfm_runtime.setup.roofline import foreseen_ms
    from lfm_runtime.setup.setup import Ask

    check_images(options)
    ask = Ask(tuple(image_size(image) for image in options.images), options.prompt)
    setup = resolve(bundle_of(options), options.profile, ask, **setting_flags(options))
    if setup.forecast is None:
        raise SettingError(
            f"{options.bundle}: config.json does not have the model's sizes, which a plan needs; copy it from the "
            "checkpoint"
        )
    if problems := setup.bundle.contradictions():
        raise BundleError(problems[0])
    costs = find_costs(
        setup.bundle, setup.variant, setup.prefill, setup.execution.threads, low_memory=setup.execution.low_memory
    )
    here = setup.profile.name == detected().profile.name
    foreseen = None if costs and here else foreseen_ms(setup, setup.forecast)
    if options.json:
        times = setup.forecast.times_ms(costs, low_memory=setup.execution.low_memory) if costs else None
        ranges = {name: [r.least, r.most] for name, r in foreseen.items()} if foreseen else None
        valid = costs.valid if costs else None  # the audit that measured them
        print_json({**setup.as_dict(), "times_ms": times, "times_valid": valid, "foreseen_ms": ranges})
        return 0
    for name, value in (
        *_forecast_rows(setup, setup.forecast, options.images),
        *_times(setup, setup.forecast, costs),
        *_foreseen(setup, foreseen),
    ):
        print(f"{name:10s} {value}")
    for step in setup.steps:
        print(f"{'to fit':10s} {step}: {setup.bound}")
    return 0


def _forecast_rows(setup: Setup, forecast: Forecast, images: Sequence[str]) -> Iterator[tuple[str, str]]:
    reads = f", prefill {setup.prefill}" if setup.prefill else ""
    low = ", one graph at a time" if setup.execution.low_memory else ""
    yield "profile", f"{setup.profile.name}: {setup.variant}{reads}{low}"
    for name, image in zip(images, forecast.images, strict=True):
        thumbnail = " and a thumbnail" if image.thumbnail else ""
        tiles = f"{image.columns} × {image.rows} tiles{thumbnail}" if image.tiled else "one view"
        yield "image", f"{name}: {image.width}×{image.height}, {tiles}, {image.tokens} tokens"
    without = "" if setup.ask.question else ", no question"
    tokens = f"{forecast.prompt_tokens} prompt ({forecast.image_tokens} image{without})"
    yield "tokens", f"{tokens}, an answer of at most {forecast.new_tokens}"
    memory = forecast.memory
    parts = f"{memory.anonymous:.0f} anonymous, {memory.mapped:.0f} mapped files"
    free = "free memory is unknown" if setup.free_mib is None else f"{setup.free_mib:,} MiB are free"
    yield "memory", f"{memory.peak:,.0f} MiB at the peak ({parts}); {free}"
    yield "disk", f"{forecast.disk_mib:,.0f} MiB of weights"


def _foreseen(setup: Setup, ranges: Mapping[str, Range] | None) -> Iterator[tuple[str, str]]:
    if ranges:
        stages = ", ".join(
            f"{name} {r.least:,.0f} to {r.most:,.0f}" for name, r in ranges.items() if name != "per_token" and r.most
        )
        token = ranges["per_token"]
        said = f"{stages} ms; then {token.least:,.1f} to {token.most:,.1f} ms a token"
        yield "foreseen", f"{said}, on a board as in profile {setup.profile.name}: counted, not measured"


def _times(setup: Setup, forecast: Forecast, costs: Costs | None) -> Iterator[tuple[str, str]]:
    if costs is None:
        advice = command("audit", setup.bundle.folder)
        yield "time", f"unknown until this variant is audited on this machine: {advice}"
        return
    times = forecast.times_ms(costs, low_memory=setup.execution.low_memory)
    stages = ", ".join(f"{name.replace('_', ' and ')} {ms:,.0f}" for name, ms in times.items() if name != "per_token")
    unfair = "" if costs.valid else ", which was not valid"
    yield "time", f"{stages} ms; then {times['per_token']:.1f} ms a token, as the last audit here measured{unfair}"
    budget, rate = setup.profile.budget, 1e3 / times["per_token"]
    if budget.ttft_ms is not None and times["ttft"] > budget.ttft_ms:
        yield "budget", f"ttft_ms {budget.ttft_ms:g} is exceeded: {times['ttft']:,.0f}"
    if budget.decode_tok_s is not None and rate < budget.decode_tok_s:
        yield "budget", f"decode_tok_s {budget.decode_tok_s:g} is not reached: {rate:,.1f}"
