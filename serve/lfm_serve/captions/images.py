"""Which files are asked about, and reading them: beside the answers, a few ahead."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from lfm_runtime.errors import EdgeError, ImageError
from lfm_runtime.images.files import MAX_BYTES
from lfm_runtime.images.names import is_hidden, is_image
from lfm_runtime.images.opened import CutImage
from lfm_runtime.model import Model

from lfm_serve.captions.output import Known

_AHEAD = 2
"""Images that are read and decoded before they are asked about."""
Place = TypeVar("Place")
_NO_MEMORY = "takes more memory than is free"


@dataclass(frozen=True)
class ReadImage:
    """A file as it was read: what a record says of it, and its pixels; or why there are none."""

    path: str  # as it was found: a file, or an URL
    key: str  # as records name it
    sha256: str | None
    size: int | None
    modified: float | None  # seconds since 1970
    image: CutImage | None = None
    error: EdgeError | None = None


def find(places: Sequence[str], *, recursive: bool, match: Sequence[str], warn: Callable[[str], None]) -> Iterator[str]:
    """Paths of images: files that are named, and of folders those with an image's suffix, in the order of names. Links
    are followed, each folder once. What cannot be read is warned of.

    Raises:
        ImageError: a place is not there.
    """
    for place in places:
        if os.path.isdir(place):  # noqa: PTH112  (names need not be UTF-8; a Path for each of a million takes memory)
            yield from _walk(place, recursive, match, warn)
        elif os.path.lexists(place):
            yield place
        else:
            raise ImageError(f"{place} does not exist; name a folder of images")


def wanted(path: str, folder: str, match: Sequence[str]) -> bool:
    """Whether a file of a folder is an image that was asked for. Patterns are of its name, or with a slash of its path
    below the folder.
    """
    name, below = os.path.basename(path), os.path.relpath(path, folder)  # noqa: PTH119
    if not is_image(name) or is_hidden(below):
        return False
    return not match or any(fnmatch.fnmatch(below if "/" in pattern else name, pattern) for pattern in match)


def _walk(top: str, recursive: bool, match: Sequence[str], warn: Callable[[str], None]) -> Iterator[str]:
    """Files of a folder before those of the folders in it."""
    seen: set[tuple[int, int]] = set()
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:  # links in a circle
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as e:
            do = "; change its permissions" if isinstance(e, PermissionError) else ""
            warn(f"{folder} cannot be read ({e.strerror}) and is left out{do}")
            continue
        below = {entry.path: entry.name for entry in found if _is_folder(entry)}
        for entry in found:
            if entry.path not in below and wanted(entry.path, top, match) and _is_file_or_broken(entry):
                yield entry.path
        folders += [path for path, name in reversed(below.items()) if recursive and not name.startswith(".")]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file_or_broken(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link to nothing, which gets a record. Pipes and devices of an image's name do not."""
    try:
        return entry.is_file() or not os.path.exists(entry.path)  # noqa: PTH110
    except OSError:
        return True


def is_unchanged(path: str, record: Known) -> bool:
    """Whether a file is as its record says, by size and time of change. One that cannot be looked at now keeps its
    record.
    """
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return True
    return (status.st_size, status.st_mtime) == (record.size, record.modified)


def read_image(model: Model, path: str, key: str, *, max_megapixels: float) -> ReadImage:
    """Read a file once: what is hashed is what is looked at. Whatever is wrong with it is the `error`."""
    size = modified = None
    try:
        status = os.stat(path)  # noqa: PTH116
        size, modified = status.st_size, status.st_mtime
        _check_plain(status)
        check_size(size)
        with open(path, "rb") as f:  # noqa: PTH123
            content = f.read(size + 1)  # Python allocates what is asked for at once
    except ImageError as e:
        return ReadImage(path, key, None, size, modified, error=e)
    except OSError as e:
        return ReadImage(path, key, None, size, modified, error=ImageError(f"cannot be read ({e.strerror})"))
    except MemoryError:
        return ReadImage(path, key, None, size, modified, error=ImageError(_NO_MEMORY))
    return opened(model, ReadImage(path, key, None, size, modified), content, max_megapixels=max_megapixels)


def _check_plain(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not a plain file")


def check_size(size: int) -> None:
    """Raise ImageError for a file that is too large to be an image."""
    if size > MAX_BYTES:
        raise ImageError(f"{size >> 20} MiB, the limit is {MAX_BYTES >> 20}; make it smaller")


def opened(model: Model, image: ReadImage, content: bytes, *, max_megapixels: float) -> ReadImage:
    """The image with the hash and the pixels of what was read."""
    image = replace(image, sha256=hashlib.sha256(content).hexdigest())
    try:
        pixels = model.open(_Named(content, image.path), max_megapixels=max_megapixels).cut()  # 48 megapixels: 144 MB
    except EdgeError as e:
        return replace(image, error=ImageError(str(e).removeprefix(f"{image.path} ")))
    except MemoryError:
        return replace(image, error=ImageError(_NO_MEMORY))
    return replace(image, image=pixels)


class _Named(io.BytesIO):
    """A file's bytes, which messages can name."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


class Reader(Generic[Place]):
    """A thread that reads images ahead of their turn."""

    def __init__(self, paths: Iterable[Place], read: Callable[[Place], ReadImage]) -> None:
        self._paths, self._read = paths, read
        self._queue: SimpleQueue[ReadImage | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()  # whose put, unlike a semaphore's release, a signal may interrupt
        for _ in range(_AHEAD):
            self._room.put(None)
        self._stopped = self._over = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._thread.start()

    def take(self, wait: bool) -> ReadImage | None:
        """The next image. None: without `wait` that none is read yet, with it that there are no more."""
        if self._over or self._stopped:
            return None
        try:
            found = self._queue.get(wait)
        except Empty:
            return None
        if found is None:
            self._over = True
            if self.failure:
                raise self.failure
            return None
        self._room.put(None)
        return None if self._stopped else found

    def stop(self) -> None:
        """No more images; may be called by a signal's handler."""
        self._stopped = True
        self._room.put(None)
        self._queue.put(None)

    def _run(self) -> None:
        try:
            for path in self._paths:
                self._room.get()
                if self._stopped:
                    break
                self._queue.put(self._read(path))
        except BaseException as e:  # noqa: BLE001  (raised where images are taken)
            self.failure = e
        self._queue.put(None)
