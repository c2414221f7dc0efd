"""How long the steps of `lfm-edge make` take and how much memory, from the model's size, the number of images and the
speed of this machine. Measured once on a 450M (docs/performance.md): right within a third, not to be planned closer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lfm_profiles import default_threads
from lfm_runtime.errors import EdgeError, counted
from lfm_runtime.formats.files import damage_is, read_json_object
from lfm_runtime.images.names import images_below, is_image

from lfm_package.make import EXPORT, STICK, Order, Step

_REFERENCE = 285.0  # GFLOP/s of the machine that the seconds below were measured on, by `_speed`
_GB = 1e9


@dataclass(frozen=True)
class Sizes:
    """Weights of a checkpoint, in billions."""

    vision: float
    table: float
    text: float  # the decoder's layers
    hidden: int

    @staticmethod
    def of(checkpoint: Path) -> Sizes:
        """From config.json and the sizes of the files.

        Raises:
            EdgeError: config.json is missing, or does not tell.
        """
        path = checkpoint / "config.json"
        config = read_json_object(path, EdgeError)
        with damage_is(EdgeError, path, "download the checkpoint again"):
            vision, text = config["vision_config"], config["text_config"]
            wide, inner = int(vision.get("hidden_size", 768)), int(vision.get("intermediate_size", 3072))
            encoder = int(vision.get("num_hidden_layers", 12)) * (4 * wide * wide + 2 * wide * inner)
            hidden = int(text["hidden_size"])
            table = int(text["vocab_size"]) * hidden
            width = 4 if "32" in str(config.get("dtype") or config.get("torch_dtype") or "") else 2
        stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / width
        return Sizes(encoder / _GB, table / _GB, max(stored - encoder - table, 0) / _GB, hidden)

    @property
    def all(self) -> float:
        """All weights."""
        return self.vision + self.table + self.text


@dataclass(frozen=True)
class Cost:
    """What a step takes."""

    seconds: float
    memory: float  # GB, at the peak; files that are mapped count
    disk: float  # GB that stay


def cost(step: Step, sizes: Sizes, order: Order, images: int, speed: float) -> Cost:
    """Of one step; `images` are there for calibration, and the machine multiplies at `speed` GFLOP/s."""
    exported = 4 * sizes.all
    if step.name == EXPORT:
        return Cost(exported / 0.1 + 2, max(0.3, 0.8 * exported), exported)
    bits = 8 if step.name == "int8" else 4
    disk = sizes.vision + (sizes.table + sizes.text) * bits / 8
    if step.name == STICK:
        return Cost(15, 0.2, disk + 0.05)
    if not images:
        return Cost(10 + 25 * sizes.all, max(0.3, 0.8 * exported), disk)
    # A quarter is held out; a quick run takes 8 and 4.
    judged = max(1, round(images / 4)) if images > 1 else 0
    used = min(images - judged, 8) if order.quick else images - judged
    judged = min(judged, 4) if order.quick else judged
    wide = sizes.text * sizes.hidden / 1024
    vision = (23 if order.quick else 42) * sizes.vision * used
    answers = (4.7 if order.quick else 6.7) * sizes.all * used
    text = (280 if order.quick else 400) * wide + 7.7 * sizes.text * used
    judging = (25 if order.quick else 33) * sizes.all * judged + 60 * sizes.all
    memory = min(0.3 + 1.3 * exported, 1.4 + 0.6 * exported)  # a 450M took 2.4 GB, a 1.6B 5.2
    return Cost((vision + answers + text + judging + 2) * _REFERENCE / speed, memory, disk)


def table(order: Order, steps: Sequence[Step]) -> str:
    """The steps that are left, what each takes, and all together; the steps alone where config.json does not tell."""
    lines = [f"{order.checkpoint} → {order.output}: {', '.join([EXPORT, *order.variants(), STICK])}"]
    images = count_images(order.calibration)
    if order.calibration:
        quick = " (quick: at most 8 and 4)" if order.quick else ""
        lines.append(f"{counted(images, 'image')}: three quarters calibrate, a quarter judges{quick}")
    if not any(step.made_of for step in steps):
        return "\n".join([*lines, "all but the stick was done before"])
    try:
        sizes = Sizes.of(order.checkpoint)
    except EdgeError:
        return "\n".join(lines)
    speed = _speed()
    costs = {step.name: _rounded(cost(step, sizes, order, images, speed)) for step in steps}
    lines.append("if nothing else runs here:")
    lines.append(f"{'step':10s} {'about':>10s} {'memory':>10s} {'disk':>10s}")
    lines += [
        f"{name:10s} {_time(c.seconds):>10s} {f'{c.memory:.1f} GB':>10s} {f'{c.disk:.1f} GB':>10s}"
        for name, c in costs.items()
    ]
    seconds, disk = (sum(getattr(c, what) for c in costs.values()) for what in ("seconds", "disk"))
    most = max(c.memory for c in costs.values())
    lines.append(f"{'in all':10s} {_time(seconds):>10s} {f'{most:.1f} GB':>10s} {f'{disk:.1f} GB':>10s}")
    return "\n".join(lines)


def _rounded(found: Cost) -> Cost:
    """As it is shown, so that the shown figures add up: tens of seconds, or minutes; tenths of a GB."""
    seconds = max(math.ceil(found.seconds / 10), 1) * 10 if found.seconds < 90 else round(found.seconds / 60) * 60
    return replace(found, seconds=seconds, disk=math.ceil(found.disk * 10) / 10)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def count_images(places: Sequence[Path]) -> int:
    """Images, as `lfm-edge quantize` finds them."""
    total = 0
    for place in places:
        if place.is_dir():
            total += len(images_below(place))
        elif is_image(place.name):
            total += 1
        else:
            try:
                lines = place.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError:
                lines = [place.name]  # an image of a rare kind
            total += sum(1 for line in lines if line.strip())
    return total


def _speed() -> float:
    """GFLOP/s of matrix products here, all cores, when nothing else runs: the best of a few tenths of a second, with
    matrices so small that one thread computes them, as others may hold the other cores.
    """
    size = 64
    a = np.ones((size, size), np.float32)
    best, until = np.inf, time.perf_counter() + 0.3
    while (started := time.perf_counter()) < until:
        for _ in range(50):
            np.matmul(a, a)
        best = min(best, time.perf_counter() - started)
    return float(100e-9 * size**3 / best) * default_threads()
