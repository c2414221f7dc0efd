"""An image that is opened, with its layout: whole, or already cut into its views."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from lfm_runtime.images.layout import ImageLayout, ImageSettings
from lfm_runtime.images.pixels import Patches, cut_views, patchify, view_pixels


@dataclass(frozen=True)
class OpenedImage:
    """An opened image with its layout."""

    image: Image.Image
    layout: ImageLayout
    settings: ImageSettings

    @cached_property
    def key(self) -> int:
        """Hash of the pixels, the layout and the settings, by which the cache finds the image."""
        return image_key(self.image.tobytes(), repr((self.image.size, self.layout, self.settings)))

    def views(self) -> Iterator[Patches]:
        """For each view its patches; see patchify."""
        return cut_views(self.image, self.layout, self.settings)

    def cut(self) -> CutImage:
        """The same without the image itself: 0.8 MB for each view, however large it was."""
        pixels = tuple(view_pixels(self.image, self.layout, self.settings))
        return CutImage(self.image.size, self.key, self.layout, self.settings, pixels)


@dataclass(frozen=True)
class CutImage:
    """An image that is cut into its views, uint8 [height, width, 3] each."""

    size: tuple[int, int]  # of the image itself, width and height
    key: int
    layout: ImageLayout
    settings: ImageSettings
    pixels: tuple[NDArray[Any], ...]

    def views(self) -> Iterator[Patches]:
        """As OpenedImage.views."""
        return (patchify(pixels, self.settings) for pixels in self.pixels)


def image_key(pixels: bytes, description: str) -> int:
    """A negative int64 (ids are not) for an image and how it is cut."""
    digest = hashlib.sha256(description.encode())
    digest.update(pixels)
    return -1 - (int.from_bytes(digest.digest()[:8], "big") >> 1)
