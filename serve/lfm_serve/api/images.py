"""Images as clients send them: data URIs or bare base64 → the file's bytes; where the server's owner allows it, also
files below one folder and URLs of some hosts.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlparse

from lfm_serve.api.errors import refused_image
from lfm_serve.api.remote import fetch
from lfm_serve.limits import Limits

_DATA = re.compile(r"data:(?P<kind>[^,]{0,200}?)(?P<base64>;\s*base64)?,", re.IGNORECASE)
_SHORTEST = 16
"""Characters of bare base64: fewer are a name or a word."""


def image_bytes(url: str, limits: Limits) -> bytes:
    """The bytes that a URL, a data URI or base64 text stands for; raises ApiError where that is nothing."""
    if match := _DATA.match(url):
        rest = url[match.end() :]
        if not match["base64"]:
            return _not_empty(unquote_to_bytes(rest))
        return _decoded(unquote_to_bytes(rest) if "%" in rest else rest.encode("ascii", "replace"))
    scheme = url.partition(":")[0].lower() if ":" in url[:12] else ""
    if scheme in ("http", "https"):
        if not limits.image_hosts:
            raise refused_image("this server fetches no URLs; send the image itself: data:image/jpeg;base64,…")
        return fetch(url, limits.image_hosts, limits.max_body_mib << 20)
    if scheme == "file" and limits.media_path:
        return _file(url, limits.media_path, limits.max_body_mib << 20)
    if scheme:
        raise refused_image(f"{scheme}: URLs are not opened; send the image itself: data:image/jpeg;base64,…")
    if len(url) < _SHORTEST:
        raise refused_image("an image is base64 text, or a data URI: data:image/jpeg;base64,…")
    return _decoded(url.encode("ascii", "replace"), "; names and paths are not opened")


def _file(url: str, folder: Path, most: int) -> bytes:
    """A file below the folder that is allowed; links that lead out of it are not."""
    root = folder.resolve()
    try:
        path = Path(unquote(urlparse(url).path)).resolve()
    except ValueError as e:  # a NUL
        raise refused_image("the file URL is none") from e
    if not path.is_relative_to(root) or not path.is_file():
        raise refused_image("there is no such file below the folder that this server opens images from")
    if path.stat().st_size > most:
        raise refused_image(f"the file has more than {most >> 20} MiB")
    return path.read_bytes()


def _decoded(text: bytes, more: str = "") -> bytes:
    """Base64, of both alphabets, with line breaks, and without padding. `more`: for the message where it is none."""
    packed = b"".join(text.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return _not_empty(base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True))
    except (binascii.Error, ValueError) as e:
        raise refused_image(f"the image is not valid base64 ({e}){more}") from e


def _not_empty(found: bytes) -> bytes:
    if not found:
        raise refused_image("the image has no bytes")
    return found
