"""The best settings for one device, found by measuring: a local search over the Pareto front of latency, memory and
quality.

Every point is measured in processes of its own (trial.py), in rounds: each point of a round once, in random order, so
that whatever the machine does meanwhile meets them all. Points of one round are compared in pairs; one that another
beats is dropped as soon as the difference is larger than chance (`_CLEARLY`). The rest is Pareto local search (Paquete,
Chiarandini and Stützle, 2004): the neighbours of points still on the front, one setting changed, are measured next,
those of the best points first.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lfm_profiles import SMALLER, VARIANTS, Device, Profile, default_threads, now
from lfm_profiles.schema import SETTINGS
from lfm_profiles.sensors import Sensors
from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import EdgeError, SettingError, more_memory
from lfm_runtime.images.layout import lay_out
from lfm_runtime.images.pixels import image_size
from lfm_runtime.setup.profile import find_profile
from lfm_runtime.setup.resolve import DoesNotFitError, resolve
from lfm_runtime.setup.setup import Ask

from lfm_audit.measure.power import Power
from lfm_audit.measure.trial import Trial, TrialError, start
from lfm_audit.measure.watch import Watch
from lfm_audit.tune.tuning import Measured, Point, Tuning

_SEARCHING = 0.7  # of the time; what is left goes into measuring the best more often
_IN_A_ROUND = 6  # points known to be good, and as many new ones
_ENOUGH = 8  # samples of a point


def tune(
    tuning: Tuning,
    device: Device,
    *,
    minutes: float,
    kept: Path,
    sensors: Sensors,
    progress: Callable[[str], None] = lambda _: None,
) -> bool:
    """Measure until the time is over or nothing is left to measure; KeyboardInterrupt ends it as well, and is returned
    as False. What was measured is in `tuning`, and after each round in the file `kept`.

    Raises:
        SettingError: nothing measures energy here.
        DoesNotFitError: not even the smallest point fits.
        TrialError: no point can be measured.
    """
    _check_objective(tuning.objective, sensors)
    random_order, begin, start_point = random.Random(tuning.rounds), time.monotonic(), tuning.first_point()  # noqa: S311
    if minutes <= 0 and tuning.front():
        return True
    with tempfile.TemporaryDirectory(prefix="lfm-edge-") as folder:
        try:
            _refer_to(tuning, _make_reference(tuning, device, Path(folder), progress))
            if not tuning.front():
                _measure(tuning, start_point, Path(folder), sensors)
                _check_some(tuning)
            while (passed := time.monotonic() - begin) < minutes * 60:
                front = tuning.front()
                new = _neighbours(tuning)[:_IN_A_ROUND] if passed < minutes * 60 * _SEARCHING else []
                if not new:  # the best again, and those that are known least
                    rest = sorted(front[_IN_A_ROUND // 2 :], key=lambda p: len(tuning.points[p].latency_ms))
                    front = [*front[: _IN_A_ROUND // 2], *rest]
                    if all(len(tuning.points[p].latency_ms) >= _ENOUGH for p in front):
                        break
                front = front[:_IN_A_ROUND]
                tuning.rounds += 1
                order = [*front, *new]
                random_order.shuffle(order)
                for n, point in enumerate(order):
                    left = minutes - (time.monotonic() - begin) / 60
                    points = len(tuning.points)
                    progress(
                        f"round {tuning.rounds}, {n + 1} of {len(order)}; {points} points known, "
                        f"{max(left, 0):.1f} min left"
                    )
                    if left <= 0 and n:
                        break
                    _measure(tuning, point, Path(folder), sensors)
                _check_some(tuning)
                tuning.save(kept)
        except KeyboardInterrupt:
            if not tuning.front():
                raise
            tuning.save(kept)
            return False
    tuning.save(kept)
    return True


def _refer_to(tuning: Tuning, reference: str) -> None:
    """KL of another reference is measured again with its point."""
    if tuning.reference not in ("", reference):
        for known in tuning.points.values():
            known.kl = None
    tuning.reference = reference


def _check_objective(objective: str, sensors: Sensors) -> None:
    """Raise SettingError where nothing here measures energy and that is what is asked for."""
    if objective == "energy" and not sensors.power_from:
        why = str(sensors.missing.get("power")).partition("; a meter's CSV")[0]  # which audit takes
        raise SettingError(f"energy cannot be measured here: {why}; choose another objective")


def _check_some(tuning: Tuning) -> None:
    """Raise TrialError when every point so far has failed."""
    if not tuning.front():
        raise TrialError(f"{tuning.bundle.folder}: {next(m.failed for m in tuning.points.values() if m.failed)}")


def _measure(tuning: Tuning, point: Point, reference: Path, sensors: Sensors) -> None:
    """One trial of a point: the first time with what its answers lose."""
    known = tuning.points.get(point, Measured())
    seen = Watch(sensors)
    trial = Trial(
        tuning.bundle.folder,
        tuning.profile_of(point),
        tuning.images,
        tuning.question,
        reference=reference if known.kl is None else None,
    )
    try:
        outcome = start(trial, watch=seen.start)
    except EdgeError as e:
        known.failed = str(e)
        tuning.points[point] = known
        return
    finally:
        seen.end()
    tuning.points[point] = known
    timed = [answer for answer in outcome.answers if answer.repeat > 0]
    known.latency_ms[tuning.rounds] = statistics.fmean(answer.total_ms for answer in timed)
    known.ttft_ms[tuning.rounds] = statistics.fmean(answer.token_times[0] - answer.started for answer in timed)
    known.peak_mib = max(known.peak_mib, outcome.memory_mib["peak"] or outcome.memory_mib["rss"] or 0.0)
    known.anonymous_mib = max(known.anonymous_mib, outcome.memory_mib["rss_anon"] or 0.0)
    known.kl = known.kl if outcome.kl is None else outcome.kl
    spent = [
        Power().joules(seen.states, *(outcome.spawned + ms / 1e3 for ms in (answer.started, answer.ended)))
        for answer in timed
    ]
    if None not in spent:
        known.energy_j[tuning.rounds] = statistics.fmean(joules for joules in spent if joules is not None)


def _make_reference(tuning: Tuning, device: Device, folder: Path, progress: Callable[[str], None]) -> str:
    """Answers of the best variant that fits here, with the checkpoint's own image settings; returns its name."""
    order = [v for v in ("fp32", *SMALLER, *tuning.bundle.variants) if v in tuning.bundle.variants]
    for variant in dict.fromkeys(order):
        settings = {"variant": variant, "low_memory": True, "prepared": True}
        try:
            fits_as_it_is(tuning, find_profile("generic", **settings))
        except DoesNotFitError:
            continue
        progress(f"computing the reference answers with {variant} and the checkpoint's own settings")
        profile = find_profile("generic", **settings)
        start(Trial(tuning.bundle.folder, profile, tuning.images, tuning.question, repeats=0, reference=folder))
        return variant
    raise DoesNotFitError(
        f"{tuning.bundle.folder}: no variant fits the {now(device).free_mib} MiB that are free; {more_memory()}, or "
        "take a smaller model"
    )


def fits_as_it_is(tuning: Tuning, profile: Profile) -> None:
    """Raise DoesNotFitError where a profile would have to step down. For the largest of the images: they are asked
    about one at a time.
    """
    largest = max((image_size(image) for image in tuning.images), key=lambda size: size[0] * size[1])
    if resolve(tuning.bundle, profile, Ask((largest,), tuning.question)).steps:
        raise DoesNotFitError(f"{tuning.bundle.folder} does not fit with profile {profile.name} as it is")


def _neighbours(tuning: Tuning) -> list[Point]:
    """Points not yet measured that differ from one of the front in one setting, those of the best first; what cannot
    be, or does not fit this device's memory, is left out.
    """
    found: dict[Point, None] = {}
    for point in tuning.front():
        for axis, values in tuning.axes.items():
            at = values.index(dict(point)[axis])
            for value in values[max(0, at - 1) : at + 2] if axis in _ORDERED else values:
                other = _agreeing({**dict(point), axis: value}, axis)
                outside = any(v not in tuning.axes[a] for a, v in other)  # what had to give way is fixed by a flag
                if outside or other in tuning.points or other in found:
                    continue
                try:
                    fits_as_it_is(tuning, tuning.profile_of(other))
                except EdgeError:
                    continue
                found[other] = None
        if len(found) >= _IN_A_ROUND:
            break
    return list(found)


def _agreeing(values: dict[str, Any], axis: str) -> Point:
    """Settings that exclude what was just set on `axis` give way: a second decoder and low_memory, or a decoder beside
    itself.
    """
    if values["prefill"] != "none" and values["low_memory"]:
        values["low_memory" if axis == "prefill" else "prefill"] = False if axis == "prefill" else "none"
    if values["prefill"] != "none" and VARIANTS[values["prefill"]].has_decoder_of(VARIANTS[values["variant"]]):
        values["prefill"] = "none"
    return tuple(sorted(values.items()))


# --------------------------------------------------------------------------------------------------------------- axes


_ORDERED = ("threads", "max_image_tokens", "tiles")


def axes_of(bundle: Bundle, profile: Profile, images: Sequence[Path]) -> dict[str, list[Any]]:
    """What may be changed, and to which values. What the user set by a flag is left as it is: one value."""
    checkpoint = bundle.images
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tiled = any(lay_out(*image_size(image), checkpoint).tiled for image in images)
    axes: dict[str, list[Any]] = {
        "variant": [v for v in bundle.variants if not VARIANTS[v].on_gpu]
        or list(bundle.variants),  # on a CPU fp16 is fp32 with casts
        "prefill": ["none", *(v for v in ("int8",) if v in bundle.variants)],
        "threads": sorted(n for n in {1, 2, 4, 8, 16, default_threads(), usable} if n <= usable),
        "low_memory": [False, True],
        "arena": [True, False],
        "max_image_tokens": _up_to(checkpoint.max_image_tokens, checkpoint.min_image_tokens, 64, 128),
        "tiles": [1, *_up_to(checkpoint.max_tiles, checkpoint.min_tiles, 4)] if tiled else [1],
    }
    for setting, value in profile.given(*(name for name in SETTINGS if profile.is_flag(name))).items():
        if setting in axes:
            axes[setting] = [value[0] if setting == "variant" else value]
        elif setting == "kv":
            axes["variant"] = [v for v in axes["variant"] if VARIANTS[v].keys == value] or axes["variant"]
        elif setting in ("do_image_splitting", "max_tiles"):
            axes["tiles"] = [1] if profile.do_image_splitting is False else [profile.max_tiles or checkpoint.max_tiles]
    return axes


def _up_to(most: int, least: int, *fewer: int) -> list[int]:
    return [*(n for n in fewer if least <= n < most), most]
