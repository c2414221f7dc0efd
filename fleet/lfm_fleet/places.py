"""Places that have an URL, read and written by fsspec: s3, gs, http, sftp, hf, whatever the user installed a driver of.

Credentials and endpoints are fsspec's own business: environment variables and ~/.config/fsspec.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec.core
from lfm_runtime.errors import EdgeError, ImageError
from lfm_runtime.images.names import is_image
from lfm_serve.captions.images import check_size, wanted

_MODIFIED = ("mtime", "LastModified", "last_modified", "updated", "modified")
"""What drivers call the time of change."""


class PlaceError(EdgeError, OSError):
    """An URL cannot be read or written: the message says why, and what to do."""


class FoundImage(NamedTuple):
    """An image of a listing; None is not told."""

    url: str
    size: int | None
    modified: float | None  # seconds since 1970


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether a place has an URL, and is no path."""
    return "://" in os.fspath(text)


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of an URL, and the path in it.

    Raises:
        PlaceError: its driver is not installed, or cannot be set up.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as e:
        raise PlaceError(f"{url}: {' '.join(str(e).split())}") from e  # which says what to install
    except MemoryError:
        raise
    except Exception as e:  # see reading
        raise PlaceError(f"{url} cannot be used ({why(e)}); see fsspec's page on this kind of URL") from e
    return fs, str(path)


@contextmanager
def reading(url: str, do: str) -> Iterator[None]:
    """Whatever a driver raises becomes a PlaceError, with what to `do`."""
    try:
        yield
    except (EdgeError, MemoryError):
        raise
    except FileNotFoundError as e:
        raise PlaceError(f"{url} does not exist; {do}") from e
    except Exception as e:  # a driver raises what its library does
        raise PlaceError(f"{url} cannot be read ({why(e)}); {do}") from e


def why(e: BaseException) -> str:
    """What a driver says, in one line."""
    text = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
    return " ".join(text.split())[:200] or type(e).__name__


def find(
    place: str, *, recursive: bool, match: Sequence[str], warn: Callable[[str], None] = lambda _: None
) -> Iterator[FoundImage]:
    """Images of a folder in the order of names, or the one that is named.

    Raises:
        PlaceError: it cannot be listed.
    """
    fs, path = filesystem(place)
    with reading(place, "name a folder of images"):
        if is_image(urlsplit(place).path):
            found = {path: fs.info(path)}
        else:
            found = fs.find(path, maxdepth=None if recursive else 1, detail=True)
    for name, info in sorted(found.items()):
        if info.get("type", "file") != "file":
            warn(f"{name} is no file; it is left out")
        elif name == path or wanted(name, path, match):
            url = place.rstrip("/") + str(name).removeprefix(path.rstrip("/"))  # drivers forget the host
            yield FoundImage(url, info.get("size"), _modified(info))


def read(url: str, size: int | None) -> bytes:
    """The bytes of an image, whose size a listing told.

    Raises:
        ImageError: it cannot be read, or is too large.
    """
    try:
        fs, path = filesystem(url)
        if size is None:
            size = fs.size(path)
        check_size(size or 0)
        content = bytes(fs.cat_file(path))
        check_size(len(content))
    except (ImageError, MemoryError):
        raise
    except Exception as e:  # see reading
        raise ImageError(f"cannot be read ({why(e)})") from e
    return content


def _modified(info: Mapping[str, Any]) -> float | None:
    for name in _MODIFIED:
        value = info.get(name)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value.replace("Z", "+00:00"))
            except ValueError:
                continue
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
