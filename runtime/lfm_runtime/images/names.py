"""Which files of a folder are images, by their names."""

from __future__ import annotations

from pathlib import Path

_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi"),
)
"""What cameras, scanners and converters write; not icons, nor what programs keep for themselves."""


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does. A file that the user names may be any kind that can be read."""
    return name.lower().endswith(_SUFFIXES)


def is_hidden(below: str) -> bool:
    """Whether a path below a folder that the user names is hidden, or in a hidden folder: thumbnails, or what a Mac
    writes beside each file.
    """
    return "/." in f"/{below}"


def images_below(folder: Path) -> list[Path]:
    """The images of a folder and of those in it, in the order of their paths; links to nothing too, so that whoever
    opens them tells of them.
    """
    found = (path for path in folder.rglob("*") if is_image(path.name) and not is_hidden(str(path.relative_to(folder))))
    return sorted(path for path in found if path.is_file() or not path.exists())
