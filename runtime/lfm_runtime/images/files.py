"""Image files → Pillow images whose pixels are not decoded yet.

Files are strangers': only formats that are decoded in this process, nothing that starts a program (Pillow calls
Ghostscript for PostScript under any name); pipes are read once, up to a limit.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import select
import stat
import time
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from lfm_runtime.errors import ImageError
from lfm_runtime.formats.files import check_no_pointer

ORIENTATION = 0x0112  # in EXIF
_WIDTH, _LENGTH, _BITS_PER_SAMPLE, _PHOTOMETRIC = 256, 257, 258, 262  # in TIFF
MAX_BYTES = 256 << 20
MAX_SECONDS = 60.0
"""Of an image that comes through a pipe."""
_AT_HAND = ("JPEG", "PNG", "GIF", "BMP", "PPM")  # what Pillow loads at its start
_FORMATS = (
    *_AT_HAND,
    "WEBP",
    "TIFF",
    "AVIF",
    "MPO",
    "JPEG2000",
    "DIB",
    "ICO",
    "ICNS",
    "TGA",
    "PCX",
    "SGI",
    "QOI",
    "DDS",
    "XBM",
    "XPM",
)
_FTYP = {
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"heim": "HEIC",
    b"heis": "HEIC",
    b"hevc": "HEIC",
    b"mif1": "HEIC",
    b"msf1": "HEIC",
    b"avif": "AVIF",
    b"avis": "AVIF",
}
_ADDED = {
    "HEIC": ("pillow_heif", "pillow-heif"),
    "JPEG XL": ("pillow_jxl", "pillow-jxl-plugin"),
    "AVIF": ("pillow_avif", "'pillow>=11.3'"),
}
"""Kind → (module that teaches it to Pillow, what to install)."""


def open_file(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """An image of a path or of a file's bytes.

    Raises:
        ImageError: a pipe that gives too much or nothing, a terminal, a kind that needs a package which is not
            installed.
        OSError: no such file, or not an image, as Pillow says it.
    """
    if not isinstance(source, bytes) and is_stream(source):
        source = read_stream(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return Image.open(file, formats=_AT_HAND)
    except UnidentifiedImageError:
        Image.init()
    if isinstance(file, io.BytesIO):
        file.seek(0)
    try:
        return Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        head = source[:16] if isinstance(source, bytes) else _head(source)
        kind = _kind(head)
        if kind is None:
            if not isinstance(source, bytes):
                check_no_pointer(Path(source), ImageError)
            raise
    return _with_package(file, kind)


def is_stream(source: str | os.PathLike[str]) -> bool:
    """Whether a path is a pipe, a device or a socket: what can be read once alone."""
    try:
        mode = Path(source).stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


class Piped(bytes):
    """What came through a pipe, with the pipe's name for messages."""

    name: str = ""


def read_stream(source: str | os.PathLike[str]) -> Piped:
    """All that comes through a pipe.

    Raises:
        ImageError: a terminal; more than MAX_BYTES; not at its end after MAX_SECONDS.
    """
    inherited = re.fullmatch(r"/dev/stdin|/(?:dev|proc/self)/fd/(\d+)", os.fspath(source))
    # A descriptor that is open already is at its end when its writers have gone; a FIFO of a name may still get one.
    descriptor = (
        os.dup(int(inherited[1] or 0)) if inherited else os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    )
    may_come = not inherited and stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    try:
        if os.isatty(descriptor):
            raise ImageError(f"{source} is a terminal; name an image file, or give one through a pipe")
        parts: list[bytes] = []
        ends = time.monotonic() + MAX_SECONDS
        while True:
            left = ends - time.monotonic()
            if left <= 0:
                raise ImageError(
                    f"{source} gave {_mb(parts)} and was not closed within {MAX_SECONDS:g} s; check the program "
                    "that writes to it"
                )
            ready, _, _ = select.select([descriptor], [], [], left)
            part = _read(descriptor) if ready else None
            if part:
                parts.append(part)
            elif part == b"" and parts:
                found = Piped(b"".join(parts))
                found.name = str(source)
                return found
            elif part == b"" and not may_come:
                raise ImageError(f"{source} is empty; name an image file")
            else:  # a FIFO whose writer has not opened it yet
                time.sleep(min(0.01, left))
            if sum(map(len, parts)) > MAX_BYTES:
                raise ImageError(f"{source} gave more than {MAX_BYTES >> 20} MiB; is it an image?")
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> bytes | None:
    try:
        return os.read(descriptor, 1 << 20)
    except BlockingIOError:
        return None


def _mb(parts: list[bytes]) -> str:
    return f"{sum(map(len, parts)) / 1e6:.1f} MB" if parts else "nothing"


def _head(source: Any) -> bytes:
    with Path(source).open("rb") as f:
        return f.read(16)


def _kind(head: bytes) -> str | None:
    if head[:2] == b"\xff\x0a" or head[:12] == b"\0\0\0\x0cJXL \r\n\x87\n":
        return "JPEG XL"
    return _FTYP.get(head[8:12]) if head[4:8] == b"ftyp" else None


def _with_package(file: Any, kind: str) -> Image.Image:
    """A file of a kind that a package of its own opens, where that is installed."""
    module, package = _ADDED[kind]
    before = set(Image.OPEN)
    try:
        added = importlib.import_module(module)
    except ImportError as e:
        raise ImageError(
            f"{kind} images need the Python package {package}; install it, or convert them to JPEG or PNG"
        ) from e
    if hasattr(added, "register_heif_opener"):
        added.register_heif_opener()
    names = sorted(set(Image.OPEN) - before) or [name for name in ("HEIF", "JXL", "AVIF") if name in Image.OPEN]
    if isinstance(file, io.BytesIO):
        file.seek(0)
    return Image.open(file, formats=names)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) once its orientation is applied, from the header alone. Pillow 13 reports a TIFF's upright size
    already.
    """
    if image.getexif().get(ORIENTATION, 1) not in (5, 6, 7, 8):
        return image.size
    tags = getattr(image, "tag_v2", None)
    if tags is not None and image.size != (tags.get(_WIDTH), tags.get(_LENGTH)):
        return image.size
    return image.height, image.width


def grey_levels(image: Image.Image) -> tuple[int, bool]:
    """(the lightest value of more than 8 bits, whether white is 0) of a grey image: what TIFF says and Pillow leaves to
    the reader.
    """
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    return (1 << bits[0]) - 1 if isinstance(bits, tuple) and 8 < bits[0] < 16 else 65535, tags.get(_PHOTOMETRIC) == 0


def transparent_sample(image: Image.Image) -> int | tuple[int, ...] | None:
    """A PNG's one transparent grey or colour, as the decoded pixels have it: Pillow scales pixels of 1 to 4 bits and
    cuts colours of 16, and leaves tRNS as it is in the file. None where there is none. Before the pixels are loaded.
    """
    value = image.info.get("transparency")
    tile = getattr(image, "tile", None)
    if image.format != "PNG" or value is None or isinstance(value, bytes) or not tile:
        return None
    layout = str(tile[0][3])
    if isinstance(value, tuple):
        return tuple(v >> 8 for v in value) if ";16" in layout else value
    return int(value) * {"1": 255, "L;2": 85, "L;4": 17}.get(layout, 1)
