"""How cost grows: vision with patches and tiles, prompts with tokens, a token with context, batches with rows, threads, memory
with context and rows. One figure of small plots, and a table of fits with their residuals.

    python scripts/bench/growth.py BUNDLE [--variant int4] [--prefill int8] [--threads 2] [--repeat 5] [-o FOLDER]

The points of a series are measured in turns, in another order each time; a point is the median. Fits are least squares, relative
to the values, of the work that is counted: what is linear in it grows as its work does. A residual above 10 % is marked.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl  # named first: an hour later is too late
import numpy as np
from lfm_runtime import Model
from lfm_runtime.images.pixels import cut_views
from lfm_runtime.setup.memory import Shapes
from measures import PHOTO, batch_rate, encode, timed_ms
from PIL import Image
from sides import fed

Terms = Callable[[float], Sequence[float]]


@dataclass
class Series:
    """Cost at some sizes, and the fit of it."""

    name: str
    axis: str
    unit: str
    terms: Terms  # of the fit
    formula: str
    measures: dict[float, Callable[[], float]]
    found: dict[float, float]
    weights: tuple[float, ...] = ()

    def measure(self, repeat: int) -> None:
        """Fill `found` and `weights`."""
        values: dict[float, list[float]] = {x: [] for x in self.measures}
        order = list(self.measures)
        for n in range(repeat + 1):
            random.Random(n).shuffle(order)
            for x in order:
                value = self.measures[x]()
                if n:
                    values[x].append(value)
        self.found = {x: statistics.median(v) for x, v in values.items()}
        y = np.array(list(self.found.values()))
        design = np.array([self.terms(x) for x in self.found]) / y[:, None]
        self.weights = tuple(np.linalg.lstsq(design, np.ones(len(y)), rcond=None)[0])

    def fitted(self, x: float) -> float:
        return float(np.dot(self.weights, self.terms(x)))

    @property
    def worst(self) -> tuple[float, float]:
        """(share by which the fit is wrong at most, where)."""
        return max((abs(y / self.fitted(x) - 1), x) for x, y in self.found.items())


def linear(x: float) -> Sequence[float]:
    return (1, x)


def quadratic(x: float) -> Sequence[float]:
    return (1, x, x * x)


def of_vision(model: Model) -> list[Series]:
    """One view of 256 to 1,024 patches; tiles of an image."""
    photo = Image.open(PHOTO).convert("RGB")
    sizes = [(256, 256), (384, 256), (384, 384), (512, 384), (512, 512)]
    views = {w * h / 256: encode(model, photo.resize((w, h))) for w, h in sizes}
    tiled: dict[float, Callable[[], float]] = {}
    for columns, rows in ((2, 1), (2, 2), (3, 2), (3, 3)):
        image = photo.resize((512 * columns, 512 * rows))
        opened = model.open(image)
        tiled[sum(len(p) for p in cut_views(opened.image, opened.layout, model.setup.images))] = encode(model, image)
    return [
        Series("an image, one view", "patches", "ms", quadratic, "a + b·n + c·n²", views, {}),
        Series("an image in tiles", "patches of all views", "ms", lambda n: (n,), "b·n", tiled, {}),
    ]


def of_text(model: Model) -> list[Series]:
    """Prompts of 32 to 2,048 tokens, tokens after 0 to 3,000, batches of 1 to 8."""

    def prompt(tokens: int) -> Callable[[], float]:
        return lambda: timed_ms(lambda: fed(model, tokens, 1))

    def token(past: int) -> Callable[[], float]:
        state = fed(model, past, 16)
        mark = state.mark()

        def measure() -> float:
            state.rewind(mark)
            return timed_ms(lambda: [state.step_token(10 + n) for n in range(16)]) / 16

        return measure

    def batch(rows: int) -> Callable[[], float]:
        rate = batch_rate(model, rows, 24)
        return lambda: 1e3 * rows / rate()

    prompts = {n: prompt(n) for n in (32, 64, 128, 256, 512, 1024, 2048)}
    pasts = {n: token(n) for n in (1, 256, 512, 1024, 1536, 2048, 3000)}
    rows = {n: batch(n) for n in (1, 2, 4, 8)}
    return [
        Series("a prompt", "tokens", "ms", quadratic, "a + b·n + c·n²", prompts, {}),
        Series("a token", "tokens before it", "ms", linear, "a + b·n", pasts, {}),
        Series("a step of several answers", "answers", "ms", linear, "a + b·n", rows, {}),
    ]


def of_threads(load: Callable[[int], Model], most: int) -> list[Series]:
    """The same image, prompt and token with 1 to all threads; fitted as a share that does not divide."""
    square = Image.open(PHOTO).convert("RGB").resize((512, 512))
    models = {n: load(n) for n in range(1, most + 1)}
    images = {n: encode(model, square) for n, model in models.items()}
    prompts = {n: (lambda m=model: timed_ms(lambda: fed(m, 275, 1))) for n, model in models.items()}
    return [
        Series("an image of 512×512", "threads", "ms", lambda n: (1, 1 / n), "a + b/n", images, {}),
        Series("a prompt of 275 tokens", "threads", "ms", lambda n: (1, 1 / n), "a + b/n", prompts, {}),
    ]


def plot(series: list[Series], path: Path) -> None:
    """Small plots of all series, points and fits."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = 3
    lines = -(-len(series) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(11, 3 * lines), constrained_layout=True)
    for axis, one in zip(axes.flat, series, strict=False):
        xs = np.array(sorted(one.found))
        dense = np.linspace(xs[0], xs[-1], 100)
        axis.plot(dense, [one.fitted(x) for x in dense], color="#888", linewidth=1)
        axis.plot(xs, [one.found[x] for x in xs], "o", color="#1f5fa8", markersize=4)
        axis.set(title=one.name, xlabel=one.axis, ylabel=one.unit, ylim=(0, None), xlim=(0, None))
    for axis in axes.flat[len(series) :]:
        axis.axis("off")
    figure.savefig(path)


def table(series: list[Series]) -> str:
    """Markdown."""
    lines = ["| what | measured | fit | largest residual |", "| --- | --- | --- | --- |"]
    for one in series:
        points = ", ".join(f"{x:,.0f}: {one.found[x]:,.3g}" for x in sorted(one.found))
        named = dict(zip([c for c in one.formula if c in "abc"], one.weights, strict=True))
        fit = f"{one.formula}; " + ", ".join(f"{name} = {value:.3g}" for name, value in named.items())
        share, where = one.worst
        lines.append(
            f"| {one.name}, {one.unit} by {one.axis} | {points} | {fit} | {'**' * (share > 0.1)}{share:.1%}{'**' * (share > 0.1)} at {where:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--variant", default="int4")
    parser.add_argument("--prefill", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/growth"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    def load(threads: int) -> Model:
        chosen = {"variant": options.variant, "prefill": options.prefill}
        return Model.load(options.bundle, profile="generic", threads=threads, **chosen)

    model = load(options.threads)
    series = [*of_vision(model), *of_text(model), *of_threads(load, options.threads)]
    for one in series:
        start = time.perf_counter()
        one.measure(options.repeat)
        share, where = one.worst
        print(
            f"{one.name:28} {one.formula:16} residual {share:.1%} at {where:,.0f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    per_token = Shapes.of(model.bundle).kv_bytes / 1024
    made = table(series)
    print(f"\n{made}\nkeys and values take {per_token:.0f} KiB a token and row")
    (options.output / "growth.md").write_text(made)
    found = [{"name": s.name, "axis": s.axis, "unit": s.unit, "found": s.found, "fit": s.weights} for s in series]
    (options.output / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(series, options.output / "growth.svg")


if __name__ == "__main__":
    main()
