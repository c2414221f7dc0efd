"""The images an audit asks about: the user's, or made ones of three sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from lfm_runtime.errors import ImageError, counted
from lfm_runtime.images.names import is_hidden, is_image
from lfm_runtime.images.pixels import open_image
from PIL import Image

SIZES = {"small": (256, 192), "512x512": (512, 512), "large": (1400, 1000)}
"""Below one view, one view, tiles."""
_MOST_IMAGES = 8


def find_images(folder: Path) -> tuple[dict[str, Path], list[dict[str, str]]]:
    """(name → image, those left out with the reason) of a folder: of the files whose names end as an image's do.

    Raises:
        ImageError: it is no folder, or holds no image that can be read.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a folder of images; name one, or leave --images out for made ones")
    found: dict[str, Path] = {}
    skipped = []
    files = [p for p in folder.iterdir() if (p.is_file() or not p.exists()) and not is_hidden(p.name)]
    for path in sorted(p for p in files if is_image(p.name)):
        reason = f"more than {_MOST_IMAGES} images" if len(found) == _MOST_IMAGES else _unreadable(path)
        if reason:
            skipped.append({"name": path.name, "reason": reason})
        else:
            found[path.name] = path
    if not found:
        why = f"; {skipped[0]['reason']}" if skipped else ""
        looked = f"{counted(len(files), 'file')} looked at{why}"
        raise ImageError(f"{folder} holds no image that can be read ({looked}); name another folder")
    return found, skipped


def make_images(folder: Path) -> dict[str, Path]:
    """An image of each of SIZES, always the same: waves of different lengths in three colours."""
    found = {}
    for name, (width, height) in SIZES.items():
        y, x = np.mgrid[0:height, 0:width]
        waves = [
            np.sin(x / (7 + 5 * c) + c) * np.cos(y / (11 + 3 * c)) + np.sin((x + y) / (60 + 20 * c)) for c in range(3)
        ]
        found[name] = folder / f"{name}.png"
        Image.fromarray((np.stack(waves, axis=-1) * 60 + 128).clip(0, 255).astype(np.uint8)).save(found[name])
    return found


def _unreadable(path: Path) -> str | None:
    try:
        open_image(path)  # all of it: one that is cut off would end a process later
    except ImageError as e:
        return str(e)
    return None
