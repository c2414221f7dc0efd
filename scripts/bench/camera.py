"""What keeping tiles saves on a camera's frames, and what noise does to it.

    python scripts/bench/camera.py speed BUNDLE IMAGE [--rounds 3] [--new-tokens 16]
    python scripts/bench/camera.py noise BUNDLE [--tolerances 0 2 4 8]

speed: frames of a still scene in which one tile changes, tile by tile, with what `lfm-edge watch` keeps of the frame
before and computed anew, in turns; then another question about the last frame. Prints a row for each tile.
noise: the demo's evaluation set as scenes, each seen twice with noise of its own (Gaussian of sigma 2, the same as JPEG of
quality 80, sigma 8). Prints for each tolerance the share of views that are not encoded again, and how many answers about
the second picture differ from those without tolerance.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from lfm_runtime import Model
from lfm_runtime.report import Report
from lfm_runtime.setup.resolve import resolve
from lfm_serve.asking import Asking
from lfm_serve.cameras.scene import Scene, cache_mib
from lfm_serve.setup import spins_briefly
from PIL import Image

DEMO = Path(__file__).resolve().parents[2] / "demo" / "eval"
QUESTIONS = Asking("What is in this image?"), Asking("Is anybody there?")


def changed(image: Image.Image, rows: int, columns: int, tile: int, seed: int) -> Image.Image:
    """A copy in which the middle of one tile is filled with another colour."""
    width, height = image.width / columns, image.height / rows
    left, top = (tile % columns + 0.3) * width, (tile // columns + 0.3) * height
    copy = image.copy()
    colour = tuple(int(c) for c in np.random.default_rng(seed).integers(0, 256, 3))
    copy.paste(colour, (round(left), round(top), round(left + 0.4 * width), round(top + 0.4 * height)))
    return copy


def asked(scene: Scene, image: Image.Image, asking: Asking, tokens: int) -> tuple[float, Report]:
    """(milliseconds from picture to answer, its report)."""
    begun = time.perf_counter()
    report = scene.ask(scene.see(image), replace(asking, generation={"temperature": 0.0, "max_new_tokens": tokens}))
    assert isinstance(report, Report)
    return (time.perf_counter() - begun) * 1e3, report


def speed(options: argparse.Namespace) -> None:
    """Print the table of one bundle and scene."""
    model = loaded(options.bundle, options.threads)
    anew = Model.of(model.setup)  # a second one: nothing is shared
    image = Image.open(options.image).convert("RGB")
    layout = model.open(image).layout
    scene = Scene(model)
    asked(scene, image, QUESTIONS[0], options.new_tokens)
    asked(Scene(anew), image, QUESTIONS[0], options.new_tokens)
    print(
        f"{model.setup.summary}; {image.width}×{image.height}: {len(layout.views)} views, {layout.tokens} image tokens"
    )
    print("tile  views encoded  tokens read  kept ms  anew ms  ratio  same text")
    before, rates = image, []
    for tile in range(layout.rows * layout.columns):
        kept, other, same = [], [], True
        for number in range(options.rounds):
            now = changed(before, layout.rows, layout.columns, tile, 100 * tile + number)
            a, report = asked(scene, now, QUESTIONS[0], options.new_tokens)
            b, wanted = asked(Scene(anew), now, QUESTIONS[0], options.new_tokens)
            kept.append(a)
            other.append(b)
            same &= report.text == wanted.text
            before = now
        ms, ms_anew = statistics.median(kept), statistics.median(other)
        rates.append((ms, ms_anew))
        read = report.prompt_tokens - report.cached_tokens
        print(
            f"{tile + 1:4}  {report.encoded_tiles:13}  {read:11}  {ms:7,.0f}  {ms_anew:7,.0f}  {ms_anew / ms:5.2f}  {same}",
            flush=True,
        )
    kept_ms, anew_ms = (sum(column) for column in zip(*rates, strict=True))
    print(
        f"any one tile: {60e3 * len(rates) / kept_ms:.1f} frames a minute, {60e3 * len(rates) / anew_ms:.1f} anew, "
        f"{anew_ms / kept_ms:.2f} times"
    )
    first = []
    for number in range(2 * options.rounds + 1):
        _, report = asked(scene, before, QUESTIONS[number % 2], options.new_tokens)
        first.append(report.timing_ms["ttft"] or 0.0)
    print(f"another question about the same frame: first token after {statistics.median(first):.0f} ms")


def noisy(image: Image.Image, sigma: float, quality: int, seed: int) -> Image.Image:
    """An image with Gaussian noise, and then as JPEG where a quality is given."""
    noise = np.random.default_rng(seed).normal(0, sigma, (image.height, image.width, 3))
    found = Image.fromarray(np.clip(np.round(np.asarray(image) + noise), 0, 255).astype(np.uint8))
    if not quality:
        return found
    file = io.BytesIO()
    found.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def questions() -> Iterator[tuple[str, Image.Image, str, str]]:
    """(name of the image, the image, question, right answer) of the demo's evaluation set."""
    for line in (DEMO / "eval.jsonl").read_text().splitlines():
        one = json.loads(line)
        yield one["image"], Image.open(DEMO / one["image"]).convert("RGB"), one["question"], one["answer"]


def noise(options: argparse.Namespace) -> None:
    """Print the table of one bundle."""
    model = loaded(options.bundle, options.threads)
    asks = list(questions())
    print("noise             tolerance  views kept  answers changed  right")
    for name, sigma, quality in (("sigma 2", 2.0, 0), ("sigma 2, JPEG 80", 2.0, 80), ("sigma 8", 8.0, 0)):
        plain: list[str] = []
        for tolerance in options.tolerances:
            texts, views, encoded = [], 0, 0
            for number, (_, image, question, _) in enumerate(asks):
                scene, asking = Scene(model, tolerance=tolerance), Asking(question)
                asked(scene, noisy(image, sigma, quality, 2 * number), asking, 24)
                _, report = asked(scene, noisy(image, sigma, quality, 2 * number + 1), asking, 24)
                texts.append(report.text)
                views, encoded = views + report.tiles, encoded + report.encoded_tiles
            plain = plain or texts
            differ = sum(a != b for a, b in zip(texts, plain, strict=True))
            right = sum(text.strip() == one[3] for text, one in zip(texts, asks, strict=True))
            print(
                f"{name:16}  {tolerance:9g}  {1 - encoded / views:10.1%}  {differ:7} of {len(asks):4}  {right:5}",
                flush=True,
            )


def loaded(bundle: Path, threads: int | None) -> Model:
    """As `lfm-edge watch` loads it."""
    setup = spins_briefly(resolve(bundle, threads=threads))
    return Model.of(replace(setup, ask=replace(setup.ask, cache_mib=cache_mib(setup))), cache_mib=cache_mib(setup))


def main() -> int:
    """Run one of them; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "noise"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("image", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.0, 2.0, 4.0, 8.0])
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    {"speed": speed, "noise": noise}[options.what](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
