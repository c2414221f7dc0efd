"""How an image is laid out: the settings, and by them its tiles, grids and image tokens. Arithmetic alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from lfm_runtime.errors import SettingError
from lfm_runtime.formats.files import read_json_object


@dataclass(frozen=True)
class ImageSettings:
    """How images become views. Names and defaults are the Hugging Face processor's; a token covers 32×32 pixels."""

    min_image_tokens: int = 64
    max_image_tokens: int = 256
    do_image_splitting: bool = True
    min_tiles: int = 2
    max_tiles: int = 10
    use_thumbnail: bool = True
    tile_size: int = 512  # pixels a side
    downsample_factor: int = 2
    encoder_patch_size: int = 16  # pixels a side
    max_pixels_tolerance: float = 2.0
    resample: int = 2  # Pillow's number: 2 bilinear, 3 bicubic
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        """Refuse values no image could be laid out with, or only in hours."""
        for name, least, most in (
            ("encoder_patch_size", 1, 256),
            ("downsample_factor", 1, 16),
            ("tile_size", 1, 1 << 13),
            ("max_image_tokens", 1, 1 << 14),
            ("min_image_tokens", 1, 1 << 14),
            ("max_tiles", 1, 100),
            ("min_tiles", 1, 100),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise SettingError(f"{name} {value} is impossible; allowed: {least} to {most}")
        if self.min_image_tokens > self.max_image_tokens:
            raise SettingError(
                f"min_image_tokens {self.min_image_tokens} is above max_image_tokens {self.max_image_tokens}"
            )
        if self.min_tiles > self.max_tiles:
            raise SettingError(f"min_tiles {self.min_tiles} is above max_tiles {self.max_tiles}")
        if self.tile_size % self.cell:
            raise SettingError(
                f"tile_size {self.tile_size} is not a multiple of {self.cell} (encoder_patch_size "
                f"{self.encoder_patch_size} times downsample_factor {self.downsample_factor}); correct one of them"
            )
        if not 0 < self.max_pixels_tolerance < math.inf:
            raise SettingError(f"max_pixels_tolerance {self.max_pixels_tolerance} is impossible; allowed: above 0")
        if self.resample not in {int(r) for r in Image.Resampling}:
            raise SettingError(f"resample {self.resample} is not one of Pillow's filters (2 bilinear, 3 bicubic)")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if (
                len(values) != 3
                or not all(map(math.isfinite, values))
                or not (min(values) > 0 if name == "image_std" else 0 <= min(values) <= max(values) <= 1)
            ):
                raise SettingError(
                    f"{name} {list(values)} is impossible; three numbers are needed, those of image_mean from 0 to 1, "
                    "those of image_std above 0"
                )

    @property
    def cell(self) -> int:
        """Side in pixels of the square that one image token covers."""
        return self.encoder_patch_size * self.downsample_factor

    @staticmethod
    def from_folder(folder: Path) -> ImageSettings:
        """Settings of a checkpoint: those inside processor_config.json's image_processor; else
        preprocessor_config.json's. What the one leaves out is looked for at the top of processor_config.json and of
        config.json, where the 2025 releases had it; else it is the reference processor's default.

        Raises:
            SettingError: a file cannot be read, or a value is of another kind or impossible; names both.
        """

        def read(name: str) -> dict[str, Any]:
            return read_json_object(
                folder / name, SettingError, required=False, advice="copy it from the checkpoint again"
            )

        processor = read("processor_config.json")
        nested = processor.get("image_processor")
        if nested is not None and not isinstance(nested, dict):
            raise SettingError(
                f"{folder / 'processor_config.json'}: image_processor is {repr(nested)[:60]}, not an object"
            )
        last = "processor_config.json's image_processor" if nested is not None else "preprocessor_config.json"
        found: dict[str, Any] = {}
        # Least specific first, so that later places override.
        for place, raw in (
            ("config.json", read("config.json")),
            ("processor_config.json", processor),
            (last, nested if nested is not None else read("preprocessor_config.json")),
        ):
            found.update(_known_settings(raw, f"{folder}: {place}"))
            try:
                ImageSettings(**found)
            except SettingError as e:
                raise SettingError(f"{folder}: {place}: {e}") from e
        return ImageSettings(**found)


def _known_settings(raw: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What a file says, by kind; raises SettingError for steps of the reference processor that can be turned off there
    and not here.
    """
    for name in ("do_normalize", "do_rescale"):
        if raw.get(name) not in (True, None):
            raise SettingError(f"{place}: image setting {name} {raw[name]!r} is not supported; only True")
    factor = raw.get("rescale_factor")
    if factor is not None and not (_is_number(factor) and abs(factor - 1 / 255) < 1e-6):
        raise SettingError(f"{place}: image setting rescale_factor {repr(factor)[:60]} is not supported; only 1/255")
    found: dict[str, Any] = {}
    for kind in fields(ImageSettings):
        value = raw.get(kind.name)
        if value is None and kind.name in raw and isinstance(kind.default, bool):
            value = False  # as the reference processor takes null
        if value is None:
            continue
        if kind.name in ("image_mean", "image_std"):
            value = (value,) * 3 if _is_number(value) else tuple(value) if isinstance(value, list) else value
            fits, wanted = isinstance(value, tuple) and all(map(_is_number, value)), "three numbers are needed"
        elif isinstance(kind.default, bool):
            fits, wanted = isinstance(value, bool), "true or false is needed"
        elif isinstance(kind.default, int):
            fits, wanted = type(value) is int, "a whole number is needed"
        else:
            fits, wanted = _is_number(value), "a number is needed"
        if not fits:
            raise SettingError(f"{place}: {kind.name} is {repr(raw[kind.name])[:60]}; {wanted}")
        found[kind.name] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def image_settings(base: ImageSettings, changes: dict[str, Any]) -> ImageSettings:
    """The checkpoint's image settings with the user's changes.

    Raises:
        SettingError: unknown or impossible; or tile settings while splitting is off.
    """
    changed = {name: value for name, value in changes.items() if value is not None}
    if (
        "max_image_tokens" in changed and "min_image_tokens" not in changed
    ):  # lowering the maximum alone is what people ask for
        changed["min_image_tokens"] = min(base.min_image_tokens, changed["max_image_tokens"])
    try:
        settings = replace(base, **changed)
    except TypeError as e:
        raise SettingError(f"image settings: {str(e).split('__init__() ')[-1]}") from e
    useless = [name for name in ("min_tiles", "max_tiles", "use_thumbnail", "tile_size") if name in changed]
    if not settings.do_image_splitting and useless:
        raise SettingError(
            f"{', '.join(useless)} has no effect while do_image_splitting is off; leave it out or turn splitting on"
        )
    return settings


@dataclass(frozen=True)
class View:
    """One call of the vision encoder: a grid of patches and the image tokens it gives."""

    rows: int  # patches
    columns: int
    tokens: int


@dataclass(frozen=True)
class ImageLayout:
    """What becomes of one image. Views are the tiles row by row, then the thumbnail; or the whole image alone."""

    width: int  # pixels of the upright source image
    height: int
    rows: int  # tiles
    columns: int
    whole_size: tuple[int, int]  # (width, height) of the whole image or thumbnail after resizing
    views: tuple[View, ...]

    @property
    def tiled(self) -> bool:
        """Whether the image is cut into more than one tile."""
        return self.rows * self.columns > 1

    @property
    def thumbnail(self) -> View | None:
        """View of the whole image beside its tiles; None where there is none."""
        return self.views[-1] if len(self.views) > self.rows * self.columns else None

    @property
    def tokens(self) -> int:
        """Image tokens of all views."""
        return sum(view.tokens for view in self.views)


def lay_out(width: int, height: int, settings: ImageSettings) -> ImageLayout:
    """Decide views and tokens for an image of `width` × `height` pixels."""
    whole = _whole_size(width, height, settings)
    splitting = settings.do_image_splitting and not settings.min_tiles == settings.max_tiles == 1
    if splitting and _is_large(width, height, settings):
        columns, rows = _tile_grid(width, height, settings)
        tile = _view(settings.tile_size, settings.tile_size, settings)
        views = [tile] * (rows * columns)
        if settings.use_thumbnail and rows * columns > 1:
            views.append(_view(*whole, settings))
        return ImageLayout(width, height, rows, columns, whole, tuple(views))
    return ImageLayout(width, height, 1, 1, whole, (_view(*whole, settings),))


def _view(width: int, height: int, settings: ImageSettings) -> View:
    rows, columns = height // settings.encoder_patch_size, width // settings.encoder_patch_size
    return View(rows, columns, (rows // settings.downsample_factor) * (columns // settings.downsample_factor))


def _whole_size(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    """(width, height) in multiples of a cell, within the token limits, near the aspect ratio. round(): half to even."""
    cell = settings.cell
    fewest, most = settings.min_image_tokens * cell * cell, settings.max_image_tokens * cell * cell
    h, w = max(cell, round(height / cell) * cell), max(cell, round(width / cell) * cell)
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        h, w = (max(cell, math.floor(side / shrink / cell) * cell) for side in (height, width))
    elif h * w < fewest:
        grow = math.sqrt(fewest / (height * width))
        h, w = (math.ceil(side * grow / cell) * cell for side in (height, width))
    return w, h


def _is_large(width: int, height: int, settings: ImageSettings) -> bool:
    cell = settings.cell
    h, w = (max(settings.encoder_patch_size, round(side / cell) * cell) for side in (height, width))
    return h * w > settings.max_image_tokens * cell * cell * settings.max_pixels_tolerance


def _tile_grid(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    """(columns, rows) with the closest aspect ratio; on a tie the later one if the image fills more than half of it."""
    aspect, area = width / height, width * height
    best, best_difference = (1, 1), math.inf
    for columns, rows in _grids(settings.min_tiles, settings.max_tiles):
        difference = abs(aspect - columns / rows)
        fills = area > 0.5 * settings.tile_size**2 * columns * rows
        if difference < best_difference or (difference == best_difference and fills):
            best, best_difference = (columns, rows), difference
    return best


@functools.cache
def _grids(fewest: int, most: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with fewest <= product <= most, by product.

    Among equal products the order is that of the reference, which sorts a set: the set is built the same way here, so
    that its order, and with it the tie-break, is the same.
    """
    found = {
        (w, h)
        for n in range(fewest, most + 1)
        for w in range(1, n + 1)
        for h in range(1, n + 1)
        if fewest <= w * h <= most
    }
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def views_of_one_size(views: Sequence[View], most: int) -> Iterator[list[View]]:
    """Yield runs of neighbouring views with the same grid, at most `most` in each."""
    for _, alike in groupby(views, lambda view: (view.rows, view.columns)):
        rest = list(alike)
        yield from (rest[i : i + most] for i in range(0, len(rest), most))
