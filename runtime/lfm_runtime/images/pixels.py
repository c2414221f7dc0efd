"""Images opened, resized, cut into patches. numpy and Pillow in, numpy out.

Follows the reference image processor (transformers, Lfm2VlImageProcessorFast) decision for decision; the layout is
separate from the pixels, so that tokens and cost are known before anything is computed.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lfm_runtime.errors import ImageError, SettingError
from lfm_runtime.formats.files import holds_a_model
from lfm_runtime.images.files import ORIENTATION, grey_levels, open_file, transparent_sample, upright_size
from lfm_runtime.images.layout import ImageLayout, ImageSettings

_log = logging.getLogger(__name__)

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any]"
Patches = NDArray[np.float32]

MAX_MEGAPIXELS = 100.0


def each_image(images: Any) -> list[Any]:
    """The images of a list, or the one that is no list: a path is not taken letter by letter, nor an array row by
    row.
    """
    one = isinstance(images, (str, os.PathLike, bytes, Image.Image)) or hasattr(images, "read")
    one = one or not isinstance(images, Iterable)
    return [images] if one or (isinstance(images, np.ndarray) and images.ndim <= 3) else list(images)


def open_image(source: ImageLike, *, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """An upright RGB image: EXIF orientation applied, transparency composited on white, 16 bits scaled to 8.

    Raises:
        ImageError: missing, not an image, truncated, empty, or above `max_megapixels`.
    """
    with _opened(source, max_megapixels) as image:
        name = str(getattr(image, "filename", "") or getattr(source, "name", "") or "an image")
        if image is not source and _has_more_pages(image):
            _tell_of_more_pages(name)
        transparent, levels = transparent_sample(image), grey_levels(image)
        image.load()
        if transparent is not None:
            image.info["transparency"] = transparent
        turned = image.getexif().get(ORIENTATION, 1) != 1  # else exif_transpose would copy the image as it is
        return _to_rgb(ImageOps.exif_transpose(image) if turned else image, levels, name)


def image_size(source: ImageLike, *, max_megapixels: float = MAX_MEGAPIXELS) -> tuple[int, int]:
    """(width, height) that open_image will give, from the file's header alone. Raises as it does, but for pixels that
    cannot be decoded.
    """
    with _opened(source, max_megapixels) as image:
        return upright_size(image)


def _has_more_pages(image: Image.Image) -> bool:
    """Whether a file has further pages or frames; the second picture of a camera's MPO is the same scene."""
    with suppress(Exception):  # damage behind the first page, which is all that is read
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    return False


@lru_cache(maxsize=1000)  # once an image
def _tell_of_more_pages(name: str) -> None:
    _log.warning("lfm-edge: %s has several pages or frames; the first one is used", name)


@contextmanager
def _opened(source: ImageLike, max_megapixels: float) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet; whatever goes wrong with it is an ImageError."""
    name = (
        str(source) or "the image ''"
        if isinstance(source, (str, os.PathLike))
        else str(getattr(source, "filename", "") or getattr(source, "name", "") or "the image")
    )
    try:
        with _pillow_limit_lifted():  # ours is checked below, before any pixel is decoded
            image = _read(source)
            with nullcontext() if image is source else image:  # closes the file
                _check_size(image, name, max_megapixels)
                yield image
    except (ImageError, SettingError, MemoryError):
        raise
    except FileNotFoundError as e:
        do = "download it first" if re.match(r"\w+://", name) else "check the path"
        raise ImageError(f"{name} does not exist; {do}") from e
    except IsADirectoryError as e:
        what = (
            "a bundle; name it first, then the images" if holds_a_model(Path(name)) else "a folder; name an image file"
        )
        raise ImageError(f"{name} is {what}") from e
    except PermissionError as e:
        raise ImageError(f"{name} cannot be read; check its permissions") from e
    except Exception as e:  # of damaged files Pillow's decoders raise anything: struct.error, SyntaxError …
        why = re.sub(r" ?<_io\.\w+ object at \w+>", "", str(e)) or type(e).__name__
        raise ImageError(f"{name} is not a readable image or is cut off ({why})") from e


def _read(source: ImageLike) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if (
            source.dtype != np.uint8
            or source.ndim not in (2, 3)
            or (source.ndim == 3 and source.shape[2] not in (1, 3, 4))
        ):
            raise ImageError(
                f"array of {source.dtype} {source.shape}: give uint8 [height, width] or [height, width, 1, 3 or 4]"
            )
        if not source.size:
            raise ImageError(f"array of shape {source.shape} has no pixels")
        return Image.fromarray(source[:, :, 0] if source.ndim == 3 and source.shape[2] == 1 else source)
    if not isinstance(source, (str, os.PathLike, bytes)):
        if not hasattr(source, "read"):
            kinds = "a path, a file, its bytes, a PIL image or an array"
            raise ImageError(f"an image is a {type(source).__name__}; give {kinds}")
        if source.seekable():
            source.seek(0)  # its header may have been read before
        content = source.read()
        if not isinstance(content, bytes):
            raise ImageError("an image is a file of text; open it as binary: open(path, 'rb')")
        return open_file(content)
    return open_file(source)


def _check_size(image: Image.Image, name: str, max_megapixels: float) -> None:
    if image.width < 1 or image.height < 1:
        raise ImageError(f"{name} has no pixels ({image.width}×{image.height})")
    if not max_megapixels > 0:
        raise SettingError(f"max_megapixels {max_megapixels:g} is impossible; allowed: above 0")
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise ImageError(
            f"{name} has {megapixels:.4g} megapixels, the limit is {max_megapixels:g}; make it smaller, or raise the "
            "limit, where a command has --max-megapixels"
        )


def _to_rgb(image: Image.Image, grey: tuple[int, bool], name: str) -> Image.Image:
    """Return the image as 8-bit RGB, transparency over white. `grey`: of grey_levels; `name`: for errors."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{name} is of mode {image.mode}, with values {values.min():g}…{values.max():g}; convert it to 8 or 16 "
                "bits"
            )
        lightest, white_is_0 = grey
        if image.mode == "I" and image.format != "PNG" and values.max() <= 255:
            lightest = 255  # 32 bits a pixel say nothing of the scale; 16-bit PNGs are opened so by older Pillows
        scaled = (np.minimum(values / lightest, 1) * 255 + 0.5).astype(np.uint8)
        if white_is_0:
            scaled = 255 - scaled
        if isinstance(image.info.get("transparency"), int):  # one grey is transparent: it becomes the canvas
            scaled[values == image.info["transparency"]] = 255
        return Image.fromarray(scaled).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, rgba)
    return image.convert("RGB")


_LIMIT_LOCK = threading.Lock()


@contextmanager
def _pillow_limit_lifted() -> Iterator[None]:
    """Pillow's own bomb limit is a global of 89 MP that warns, then raises at twice that; ours is per call."""
    with _LIMIT_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def view_pixels(image: Image.Image, layout: ImageLayout, settings: ImageSettings) -> Iterator[NDArray[np.uint8]]:
    """For each view of the layout, its pixels uint8 [height, width, 3]."""
    resample = Image.Resampling(settings.resample)
    if layout.tiled:
        side = settings.tile_size
        large = _resized(image, (side * layout.columns, side * layout.rows), resample)
        for row in range(layout.rows):
            for column in range(layout.columns):
                yield np.asarray(large.crop((column * side, row * side, (column + 1) * side, (row + 1) * side)))
        if layout.thumbnail is None:
            return
    yield np.asarray(_resized(image, layout.whole_size, resample))


def cut_views(image: Image.Image, layout: ImageLayout, settings: ImageSettings) -> Iterator[Patches]:
    """For each view of the layout, its patches float32 [rows·columns, patch²·3] in (row, column, channel) order."""
    return (patchify(pixels, settings) for pixels in view_pixels(image, layout, settings))


def _resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Columns first, then rows, rounded to 8 bits between, as torch does. Pillow 13 would go the other way."""
    for step in ((size[0], image.height), size):
        if image.size != step:
            image = image.resize(step, resample)
    return image


def patchify(pixels: NDArray[np.uint8], settings: ImageSettings) -> Patches:
    """uint8 [height, width, 3] → normalised float32 [patches, patch²·3]."""
    size = settings.encoder_patch_size
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    patches = (
        pixels.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, size, size, 3)
    )
    mean = np.asarray(settings.image_mean, np.float32) * np.float32(255)
    scale = np.float32(1) / (np.asarray(settings.image_std, np.float32) * np.float32(255))
    normalised: Patches = (patches.astype(np.float32) - mean) * scale
    return normalised.reshape(rows * columns, -1)
