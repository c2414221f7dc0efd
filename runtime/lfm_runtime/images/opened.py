"""An image that is opened, with its layout: whole, or already cut into its views."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lfm_runtime.images.layout import ImageLayout, ImageSettings
from lfm_runtime.images.pixels import Patches, patchify, view_pixels


@dataclass(frozen=True)
class OpenedImage:
    """An opened image with its layout."""

    image: Image.Image
    layout: ImageLayout
    settings: ImageSettings

    def patches(self, wanted: Container[int]) -> Iterator[Patches]:
        """Of each wanted view, by number, its patches; see patchify."""
        pixels = enumerate(view_pixels(self.image, self.layout, self.settings))
        return (patchify(view, self.settings) for n, view in pixels if n in wanted)

    def cut(self) -> CutImage:
        """The same without the image itself: 0.8 MB for each view, however large it was."""
        pixels = tuple(view_pixels(self.image, self.layout, self.settings))
        return CutImage(self.image.size, self.layout, self.settings, pixels)


@dataclass(frozen=True, eq=False)
class CutImage:
    """An image that is cut into its views, uint8 [height, width, 3] each."""

    size: tuple[int, int]  # of the image itself, width and height
    layout: ImageLayout
    settings: ImageSettings
    pixels: tuple[NDArray[np.uint8], ...]

    @cached_property
    def keys(self) -> tuple[int, ...]:
        """Of each view a hash of all that its features depend on: by it the cache, and a prompt's context, find it."""
        of = self.settings
        how = repr((of.encoder_patch_size, of.downsample_factor, of.image_mean, of.image_std))
        return tuple(view_key(pixels, how) for pixels in self.pixels)

    def patches(self, wanted: Container[int]) -> Iterator[Patches]:
        """As OpenedImage.patches."""
        return (patchify(view, self.settings) for n, view in enumerate(self.pixels) if n in wanted)

    def cut(self) -> CutImage:
        """Itself."""
        return self


def view_key(pixels: NDArray[np.uint8], how: str) -> int:
    """A negative int64 (ids are not) for the pixels [height, width, 3] of a view and how they become patches."""
    digest = hashlib.sha256(f"{pixels.shape} {how}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return -1 - (int.from_bytes(digest.digest()[:8], "big") >> 1)
