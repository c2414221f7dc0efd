"""Boxes that a model writes as text → pixels of the original image; and drawn on it.

Two families of spelling: `{"label": …, "bbox": [x1, y1, x2, y2]}` with numbers from 0 to 1 (LFM2.5-VL-450M, 1.6B), and
`{"image_id": 0, "bbox_2d": [x1, y1, x2, y2], "label": …}` from 0 to 1000 (3B), whose layout has lines as well:
`image_index=0 title [x1, y1, x2, y2]`. Coordinates are relative to the whole image, so tiles do not matter.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lfm_runtime.images.pixels import MAX_MEGAPIXELS, ImageLike, open_image

_KEYS = ("bbox_2d", "bbox", "box_2d", "box")
_LINE = re.compile(
    r"^\s*image_index=(?P<image>\d+)\s+(?P<label>[^\[\n]*?)\s*\[(?P<box>\s*[\d.]+\s*(?:,\s*[\d.]+\s*){3})\]",
    re.MULTILINE,
)
_MOST = 1000  # of boxes, and what their coordinates are parts of
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000")


@dataclass(frozen=True)
class Box:
    """A box in pixels of an image: 0 ≤ left < right ≤ width, 0 ≤ top < bottom ≤ height. `image`: which, from 0."""

    label: str
    left: float
    top: float
    right: float
    bottom: float
    image: int = 0


def parse_boxes(text: str, sizes: Sequence[tuple[int, int]]) -> list[Box]:
    """The boxes in an answer, in order. Fences, text around the JSON and an end that is missing do not matter; corners
    are clamped to the image and swapped where they are the wrong way round; what has no area is left out.

    Args:
        text: the answer.
        sizes: (width, height) of each image of the question, upright, in pixels.
    """
    found = []
    for label, image, corners, unit in (*_from_json(text), *_from_lines(text)):
        if image >= len(sizes):
            continue
        x1, y1, x2, y2 = (min(max(value / unit, 0.0), 1.0) for value in corners)
        width, height = sizes[image]
        left, right, top, bottom = *sorted((x1 * width, x2 * width)), *sorted((y1 * height, y2 * height))
        if left < right and top < bottom:
            found.append(Box(label, left, top, right, bottom, image))
    return found[:_MOST]


def _from_json(text: str) -> Iterator[tuple[str, int, list[float], float]]:
    decoder, at = json.JSONDecoder(), 0
    while (at := text.find("{", at)) >= 0:
        try:
            one, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):  # perhaps one inside of it can be read
            at += 1
            continue
        key = next((key for key in _KEYS if key in one), None)
        if key is None:  # an object around the boxes
            at += 1
            continue
        at = end
        corners, image = _corners(one[key]), one.get("image_id", one.get("image_index", 0))
        if corners and isinstance(image, int) and image >= 0:
            relative = max(corners) <= 1 and (key != "bbox_2d" or any(not value.is_integer() for value in corners))
            yield str(one.get("label", "")), image, corners, 1.0 if relative else float(_MOST)


def _from_lines(text: str) -> Iterator[tuple[str, int, list[float], float]]:
    for match in _LINE.finditer(text):
        if corners := _corners([float(part) for part in match["box"].split(",") if part.count(".") < 2]):
            yield match["label"], int(match["image"]), corners, 1.0 if max(corners) <= 1 else float(_MOST)


def _corners(raw: Any) -> list[float]:
    """Four finite numbers; else none."""
    if not isinstance(raw, list) or len(raw) != 4:
        return []
    numbers = [float(v) for v in raw if isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e9]
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else []


def draw_boxes(image: ImageLike, boxes: Sequence[Box], *, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """A copy of the image, upright, with each box and its label; a label always has the same colour.

    Raises:
        ImageError: it cannot be opened.
    """
    canvas = open_image(image, max_megapixels=max_megapixels).convert("RGB")
    draw = ImageDraw.Draw(canvas)
    line = max(2, round(max(canvas.size) / 400))
    font = ImageFont.load_default(max(12, 6 * line))
    for box in boxes:
        colour = _COLOURS[zlib.crc32(box.label.encode()) % len(_COLOURS)]
        draw.rectangle((box.left, box.top, box.right, box.bottom), outline=colour, width=line)
        if label := " ".join(box.label.split())[:60]:
            right, bottom = draw.textbbox((0, 0), label, font=font)[2:]
            x = min(box.left, max(0.0, canvas.width - right - 2 * line))
            y = box.top - bottom - 2 * line if box.top > bottom + 2 * line else box.top
            draw.rectangle((x, y, x + right + 2 * line, y + bottom + 2 * line), fill=colour)
            draw.text((x + line, y + line), label, font=font, fill="white")
    return canvas
