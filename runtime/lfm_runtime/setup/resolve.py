"""From a bundle and the user's wishes to a Setup that fits this machine: which profile, GPU or CPU, how much memory."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm_profiles import SMALLER, VARIANTS, Device, Profile, now, stepped_down
from lfm_profiles.schema import TILE_SETTINGS

from lfm_runtime.bundle import Bundle
from lfm_runtime.engine.gpu import GpuError, check_tensorrt
from lfm_runtime.engine.gpu_wheel import CUDA, TENSORRT
from lfm_runtime.errors import EdgeError, SettingError, command
from lfm_runtime.formats.contract import VISION_ENCODER
from lfm_runtime.images.layout import ImageSettings
from lfm_runtime.setup.forecast import Memory
from lfm_runtime.setup.machine import room_advice, this_machine
from lfm_runtime.setup.memory import check_gpu_memory, forecast, variant_bytes
from lfm_runtime.setup.profile import default_name, find_profile, on_cpu
from lfm_runtime.setup.setup import Ask, Flags, Setup, settle
from lfm_runtime.setup.variants import choose_variant

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

_log = logging.getLogger(__name__)
FEW_IMAGE_TOKENS = 64


class DoesNotFitError(EdgeError, MemoryError):
    """No setup fits the memory there is; the message has the numbers."""


def resolve(
    bundle: str | Path | Bundle,
    profile: str | os.PathLike[str] | Profile = "",
    ask: Ask | None = None,
    *,
    force: bool = False,
    verify: bool = False,
    device: Device | None = None,
    **flags: Unpack[Flags],
) -> Setup:
    """How a run will be made. Nothing is loaded.

    A setup that would take more memory than there is steps down, in this order, until it fits: no prefill decoder,
    fewer tiles, no tiles, fewer image tokens, one graph at a time, a smaller variant; then whatever of it was not
    needed is taken back. What the user set by a flag stays. An automatic profile whose GPU cannot compute this bundle
    falls back to the CPU, with a warning.

    Args:
        bundle: the bundle, opened or not.
        profile: a shipped profile's name or a TOML file; by default LFM_EDGE_PROFILE's, else the one packed with the
            bundle, else the one for this machine.
        ask: what it will be asked; by default about one image that fills the most tiles.
        force: the first setup stands, whether it fits or not.
        verify: hash large files as well, not only small ones.
        device: whose memory is to be kept to; by default this machine's.
        **flags: settings of a profile, which override it.

    Raises:
        BundleError: the folder cannot be used.
        SettingError: an unknown, impossible or useless setting.
        GpuError: a GPU that was named and cannot be used.
        DoesNotFitError: not even the smallest setup fits.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    if verify:
        bundle.verify()
    chosen = _usable(bundle, find_profile(profile or default_name(bundle), **flags))
    first = settle(bundle, chosen, ask or _one_large_image(bundle.images), verify=verify)
    return _fitted(first, device or now(this_machine().device), force=force)


def _usable(bundle: Bundle, profile: Profile) -> Profile:
    """The profile, or the CPU's where nobody named it and its GPU cannot compute this bundle."""
    if CUDA not in profile.providers:
        return profile
    try:
        _check_gpu(bundle, profile)
    except GpuError as e:
        if not profile.automatic:
            raise
        _log.warning("lfm-edge: computing on the CPU: %s", e)
        return on_cpu(profile)
    return profile


def _check_gpu(bundle: Bundle, profile: Profile) -> None:
    """Raise GpuError where this GPU cannot compute this bundle, SettingError for what a GPU does not do."""
    # As nvidia-smi counts, or another card's memory would be looked at. CUDA reads it when it is first used.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if problem := this_machine().gpu_problem:
        raise GpuError(
            f"profile {profile.name} needs a GPU: {problem}; choose another profile: --profile auto takes what fits"
        )
    name = choose_variant(bundle.variants, profile)
    if not VARIANTS[name].on_gpu and not profile.is_flag("variant"):
        raise GpuError(
            f"{bundle.folder} has no variant that runs completely on a GPU, only {', '.join(bundle.variants)}; "
            f"make one: {command('quantize', bundle.folder, '--variant', profile.variant[0])}"
        )
    if TENSORRT in profile.providers:
        check_tensorrt(bundle.graphs(name)[1][VISION_ENCODER.stem])
    if profile.low_memory:
        raise SettingError(
            "low_memory is for the CPU: on a GPU the graphs stay loaded; leave it out, or take a smaller variant"
        )
    check_gpu_memory(bundle, name)


def _one_large_image(images: ImageSettings) -> Ask:
    """Return an Ask for one image of the most tiles that the settings allow."""
    tiles = images.max_tiles if images.do_image_splitting else 1
    return Ask(((images.tile_size * tiles, images.tile_size),) if tiles > 1 else ((images.tile_size,) * 2,))


# ------------------------------------------------------------------------------------------------- fitting the memory


def _fitted(first: Setup, device: Device, *, force: bool) -> Setup:
    """Return `first`, or what it steps down to until it fits the memory."""
    start = Memory.of_this_process()
    free, whole = device.free_mib, device.usable_mib
    budget = first.profile.budget.peak_rss_mib

    def with_forecast(setup: Setup) -> Setup:
        left = device.address_free_mib
        return replace(setup, forecast=forecast(setup, start), free_mib=free, address_free_mib=left)

    def peak(setup: Setup) -> float:
        return setup.forecast.memory.peak if setup.forecast else 0.0

    def fits(setup: Setup) -> bool:
        address = setup.forecast.address_mib if setup.forecast else 0.0
        return (
            (device.address_free_mib is None or address <= device.address_free_mib)
            and (free is None or peak(setup) - start.peak <= free)
            and (whole is None or peak(setup) <= whole)
            and (budget is None or peak(setup) <= budget)
        )

    def with_steps(steps: Sequence[tuple[str, dict[str, Any]]]) -> Setup:
        profile = first.profile
        for _, settings in steps:
            profile = stepped_down(profile, settings)
        found = with_forecast(settle(first.bundle, profile, first.ask, verify=first.verify))
        return replace(found, steps=tuple(words for words, _ in steps), bound=first.bound, remedy=first.remedy)

    first = with_forecast(first)
    if first.execution.on_gpu or first.forecast is None:  # a GPU's memory is another, and was looked at
        return first
    if free is None:
        _say_memory_is_unknown()
    if force or fits(first):
        return first
    bound, remedy = _bound(first, device, start)
    first = replace(first, bound=bound, remedy=remedy)
    taken: list[tuple[str, dict[str, Any]]] = []
    smallest = first
    for step in _steps_down(first):
        taken.append(step)
        found = with_steps(taken)
        smallest = min(smallest, found, key=peak)
        if fits(found):
            for done in list(taken):
                rest = [s for s in taken if s is not done]
                if fits(with_steps(rest)):
                    taken = rest
            return with_steps(taken)
    alone = with_forecast(replace(smallest, ask=replace(first.ask, kv_tokens=0, cache_mib=0)))
    raise DoesNotFitError(_numbers(first, smallest, device, start, kept=fits(alone)))


def _bound(setup: Setup, device: Device, start: Memory) -> tuple[str, str]:
    """The tightest of what a setup does not fit, and what would give it more, in words."""
    left, budget = device.address_free_mib, setup.profile.budget.peak_rss_mib
    if setup.forecast and left is not None and left < setup.forecast.address_mib:
        return f"ulimit -v leaves {left} MiB", "raise ulimit -v"
    more = room_advice(device)
    limits = (
        (device.free_mib and device.free_mib + start.peak, (f"{device.free_mib} MiB are free", more)),
        (device.usable_mib, (f"this process may use {device.usable_mib} MiB", more)),
        (budget, (_allowed(setup), "take another profile")),
    )
    return min((limit, words) for limit, words in limits if limit is not None)[1]


def _allowed(setup: Setup) -> str:
    return f"profile {setup.profile.name} allows {setup.profile.budget.peak_rss_mib} MiB (peak_rss_mib)"


def _numbers(first: Setup, smallest: Setup, device: Device, start: Memory, *, kept: bool) -> str:
    """What is needed, what there is, and what helps. `kept`: it fits without what is kept for further questions."""
    cache = " or a smaller cache" if first.ask.cache_mib else ""
    fewer = f"fewer rows{',' if cache else ' or'} a shorter context" if first.ask.kv_tokens else ""
    smaller = (fewer + cache if fewer else "a smaller cache") if kept else "a smaller model"
    assert smallest.forecast is not None
    memory, budget = smallest.forecast.memory, first.profile.budget.peak_rss_mib
    wanted = f"at least {memory.peak:.0f} MiB ({memory.anonymous:.0f} anonymous; {smallest.variant})"
    room = min((n for n in (device.usable_mib, device.free_mib) if n is not None), default=None)
    if budget and (room is None or memory.peak <= room):  # planned here for a smaller machine
        return f"{first.bundle.folder} needs {wanted}; {_allowed(first)}. Take {smaller}, or another profile"
    needed, left = smallest.forecast.address_mib, device.address_free_mib
    if left is not None and left < needed:
        return (
            f"{first.bundle.folder} would need about {needed:.0f} MiB of address space ({smallest.variant}); ulimit -v "
            f"leaves {left}. Raise it, or take {smaller}"
        )
    there = f"this process may use {device.usable_mib} MiB ({device.limit_by or 'the machine'}), "
    there += f"of which {device.free_mib} are free; it already uses {start.peak:.0f}"
    there += f"; the budget of profile {first.profile.name} is {budget} MiB" if budget else ""
    do = f"take {smaller}" if kept else f"{room_advice(device)}, or take {smaller}"
    return f"{first.bundle.folder} needs {wanted}; {there}. {do[0].upper()}{do[1:]}"


@functools.cache
def _say_memory_is_unknown() -> None:
    """Warn once a process that free memory is not known."""
    _log.warning("lfm-edge: the free memory is unknown here (/proc/meminfo); memory is not checked before a run")


def _steps_down(setup: Setup) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what it is, settings) of each step that the user's flags leave open."""
    profile, images = setup.profile, setup.images
    layouts = setup.forecast.images if setup.forecast else ()

    def free(*names: str) -> bool:
        return not any(profile.is_flag(name) for name in names)

    if setup.prefill and free("prefill"):
        yield f"no {setup.prefill} decoder for prefill", {"prefill": "none"}
    if any(layout.tiled for layout in layouts) and free("do_image_splitting"):
        tiles = max(layout.rows * layout.columns for layout in layouts)
        if tiles > 4 and images.min_tiles <= 4 and free("max_tiles"):
            yield "at most 4 tiles", {"max_tiles": 4}
        if free(*TILE_SETTINGS):
            yield "no tiles", {"do_image_splitting": False}
    if layouts and images.max_image_tokens > FEW_IMAGE_TOKENS and free("max_image_tokens", "min_image_tokens"):
        # Not tiled, or more images would count as large.
        whole = {"do_image_splitting": False} if free("do_image_splitting", *TILE_SETTINGS) else {}
        yield f"at most {FEW_IMAGE_TOKENS} tokens an image", {"max_image_tokens": FEW_IMAGE_TOKENS, **whole}
    if not profile.low_memory and free("low_memory", "prefill"):
        yield "one graph in memory at a time", {"low_memory": True}
    if free("variant"):
        most = variant_bytes(setup.bundle, setup.variant)
        for variant in SMALLER:
            if variant in setup.bundle.variants and variant_bytes(setup.bundle, variant) < most:
                yield f"{variant} instead of {setup.variant}", {"variant": (variant,)}
