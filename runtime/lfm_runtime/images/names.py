"""Which files of a folder are images, by their names."""

from __future__ import annotations

_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi"),
)
"""What cameras, scanners and converters write; not icons, nor what programs keep for themselves."""


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does. A file that the user names may be any kind that can be read."""
    return name.lower().endswith(_SUFFIXES)
