"""Pictures with questions and answers for the demo model: drawn here, seeded, never downloaded.

Two kinds of pictures: coloured shapes on a 3×3 grid (describe, count, where) and one line of text (read). Every sample
also carries the dense labels that training uses; evaluation ignores them. Fonts are DejaVu, from matplotlib's wheel.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (215, 35, 40),
    "green": (40, 165, 60),
    "blue": (45, 85, 225),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 185),
    "orange": (245, 130, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = tuple(
    f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")
)  # index = 3·row + column
LIGHT = ((255, 255, 255), (235, 235, 235), (225, 235, 245), (245, 240, 225))
DARK = ((15, 15, 20), (35, 35, 40), (20, 30, 50), (45, 35, 30))
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
CHARACTERS = LETTERS + DIGITS
FONTS = ("DejaVuSans.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf")

DESCRIBE = ("What is in this image?", "Describe the image.")
READ = ("What does it say?", "Read the text.")
TASKS = ("describe", "count", "where", "read")
SIDES = (128, 160, 192, 224, 256)
PATCH = 16


@dataclass
class Sample:
    """One picture (RGB) with (task, question, answer) triples; labels are int64 [rows, cols] of 16×16 patches."""

    image: Image.Image
    questions: list[tuple[str, str, str]]
    shape_labels: np.ndarray = field(repr=False)  # 0 none, else 1 + 5·colour + shape
    character_labels: np.ndarray = field(repr=False)  # 0 none, else 1 + index in CHARACTERS
    slot_labels: np.ndarray = field(repr=False)  # 0 none, else 1 + position of the character in the text


def draw_sample(rng: random.Random, kind: str, width: int, height: int) -> Sample:
    """Draw a sample of `kind` "shapes" or "text"; width and height are multiples of 32."""
    return _draw_shapes(rng, width, height) if kind == "shapes" else _draw_text(rng, width, height)


def random_size(rng: random.Random) -> tuple[int, int]:
    """(width, height) as the evaluation uses them: half 128×128, half any of 128…256 in steps of 32."""
    if rng.random() < 0.5:
        return 128, 128
    return rng.choice(SIDES), rng.choice(SIDES)


# ------------------------------------------------------------------------------------------------------------ shapes


@dataclass(frozen=True)
class _Thing:
    colour: str
    shape: str
    cell: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def _draw_shapes(rng: random.Random, width: int, height: int) -> Sample:
    image = Image.new("RGB", (width, height), rng.choice(LIGHT + DARK))
    draw = ImageDraw.Draw(image)
    things: list[_Thing] = []
    # A small palette per picture makes repeated colours and shapes common, so that counting is worth asking.
    colours = rng.sample(list(COLOURS), rng.choice((2, 3, 4, 6)))
    shapes = rng.sample(SHAPES, rng.choice((2, 3, 5)))
    labels = np.zeros((height // PATCH, width // PATCH), np.int64)
    for cell in sorted(rng.sample(range(9), rng.randint(1, 4))):
        thing = _Thing(rng.choice(colours), rng.choice(shapes), cell)
        cell_w, cell_h = width / 3, height / 3
        radius = min(cell_w, cell_h) * rng.uniform(0.32, 0.46)
        x = (cell % 3 + 0.5) * cell_w + rng.uniform(-0.1, 0.1) * cell_w
        y = (cell // 3 + 0.5) * cell_h + rng.uniform(-0.1, 0.1) * cell_h
        fill = tuple(max(0, min(255, value + rng.randint(-12, 12))) for value in COLOURS[thing.colour])
        _paint(draw, thing.shape, x, y, radius, fill)
        label = 1 + list(COLOURS).index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)
        ys, xs = np.mgrid[: labels.shape[0], : labels.shape[1]] * PATCH + PATCH / 2
        labels[np.hypot(xs - x, ys - y) <= radius * 0.9] = label
        labels[min(int(y) // PATCH, labels.shape[0] - 1), min(int(x) // PATCH, labels.shape[1] - 1)] = label
        things.append(thing)
    questions = [("describe", rng.choice(DESCRIBE), ", ".join(thing.name for thing in things))]
    questions += _count_questions(rng, things, colours, shapes)
    names = [thing.name for thing in things]
    unique = [thing for thing in things if names.count(thing.name) == 1]
    for thing in rng.sample(unique, min(3, len(unique))):
        questions.append(("where", f"Where is the {thing.name}?", PLACES[thing.cell]))
    none = np.zeros_like(labels)
    return Sample(image, questions, labels, none, none)


def _count_questions(
    rng: random.Random, things: list[_Thing], colours: list[str], shapes: list[str]
) -> list[tuple[str, str, str]]:
    subject = rng.choice(things)
    absent = _Thing(rng.choice(colours), rng.choice(shapes), -1)
    asked = [
        (f"{subject.colour} shapes", lambda thing: thing.colour == subject.colour),
        (f"{subject.shape}s" if subject.shape != "cross" else "crosses", lambda thing: thing.shape == subject.shape),
        ("shapes", lambda _: True),
        (f"{absent.colour} shapes", lambda thing: thing.colour == absent.colour),
        (f"{absent.shape}s" if absent.shape != "cross" else "crosses", lambda thing: thing.shape == absent.shape),
    ]
    return [("count", f"How many {what}?", str(sum(map(matches, things)))) for what, matches in rng.sample(asked, 2)]


def _paint(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, ...]) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        s = r * 0.85
        draw.rectangle((x - s, y - s, x + s, y + s), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r * 0.8), (x - r, y + r * 0.8)], fill=fill)
    elif shape == "star":
        points = []
        for i in range(10):
            length = r * (1.08 if i % 2 == 0 else 0.45)
            angle = math.pi * (i / 5 - 0.5)
            points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
        draw.polygon(points, fill=fill)
    else:
        arm = r * 0.3
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)


# -------------------------------------------------------------------------------------------------------------- text


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib as mpl

    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / name), size)


def _random_text(rng: random.Random) -> str:
    """A word or a number of 3 to 5 characters; never mixed, so that O and 0 or I and 1 cannot be confused."""
    alphabet = LETTERS if rng.random() < 0.6 else DIGITS
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 5)))


def _draw_text(rng: random.Random, width: int, height: int) -> Sample:
    dark = rng.random() < 0.4
    image = Image.new("RGB", (width, height), rng.choice(DARK if dark else LIGHT))
    draw = ImageDraw.Draw(image)
    text = _random_text(rng)
    name = rng.choice(FONTS)
    probe = _font(name, 40)
    wanted = width * rng.uniform(0.72, 0.92)
    size = int(min(40 * wanted / probe.getlength(text), height * 0.45))
    font = _font(name, size)
    _, top, right, bottom = font.getbbox(text)
    x = rng.uniform(2, max(3, width - 2 - right))
    y = rng.uniform(2 - top, max(3 - top, height - 2 - bottom))
    ink = rng.choice(
        ((250, 250, 250), (255, 230, 120), (150, 220, 255)) if dark else ((10, 10, 10), (160, 20, 30), (20, 40, 140))
    )
    draw.text((x, y), text, font=font, fill=ink)
    shape = (height // PATCH, width // PATCH)
    characters, slots = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    ys, xs = np.mgrid[: shape[0], : shape[1]] * PATCH + PATCH / 2
    inside_y = (ys >= y + top - 4) & (ys <= y + bottom + 4)
    for index, character in enumerate(text):
        start, end = x + font.getlength(text[:index]), x + font.getlength(text[: index + 1])
        here = inside_y & (xs >= start) & (xs < end)
        characters[here] = 1 + CHARACTERS.index(character)
        slots[here] = 1 + index
    return Sample(image, [("read", rng.choice(READ), text)], np.zeros(shape, np.int64), characters, slots)


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluation_questions(seed: int, per_task: int) -> list[tuple[Image.Image, list[tuple[str, str, str]]]]:
    """Pictures with their questions, `per_task` of each task in all; the same for the same seed and Pillow."""
    rng = random.Random(f"lfm-edge evaluation {seed}")
    wanted = dict.fromkeys(TASKS, per_task)
    out = []
    while any(wanted.values()):
        kind = "shapes" if any(wanted[task] for task in ("describe", "count", "where")) else "text"
        sample = draw_sample(rng, kind, *random_size(rng))
        chosen: dict[str, tuple[str, str, str]] = {}
        for task, question, answer in sample.questions:
            if wanted[task] and task not in chosen:  # one of each task a picture
                chosen[task] = (task, question, answer)
                wanted[task] -= 1
        if chosen:
            out.append((sample.image, list(chosen.values())))
    return out


def write_evaluation(folder: Path, seed: int, per_task: int) -> int:
    """Write `images/*.png` and `<folder's name>.jsonl` (image, question, answer, task); returns the number of
    questions.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (image, questions) in enumerate(evaluation_questions(seed, per_task)):
        name = f"images/{index:04d}.png"
        image.save(folder / name, optimize=True)
        for task, question, answer in questions:
            lines.append(json.dumps({"image": name, "question": question, "answer": answer, "task": task}))
    (folder / f"{folder.name}.jsonl").write_text("\n".join(lines) + "\n")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw an evaluation or calibration set for the demo model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-task", type=int, default=120)
    options = parser.parse_args()
    print(write_evaluation(options.folder, options.seed, options.per_task), "questions in", options.folder)


if __name__ == "__main__":
    main()
