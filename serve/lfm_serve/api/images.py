"""Images as clients send them: data URIs or bare base64 → the file's bytes. Nothing is fetched, no file is opened."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from lfm_serve.api.errors import ApiError

_DATA = re.compile(r"data:(?P<kind>[^,]{0,200}?)(?P<base64>;\s*base64)?,", re.IGNORECASE)
_SHORTEST = 16
"""Characters of bare base64: fewer are a name or a word."""


def image_bytes(url: str) -> bytes:
    """The bytes that a data URI or base64 text holds; raises ApiError for anything else."""
    if match := _DATA.match(url):
        rest = url[match.end() :]
        if not match["base64"]:
            return _not_empty(unquote_to_bytes(rest))
        return _decoded(unquote_to_bytes(rest) if "%" in rest else rest.encode("ascii", "replace"))
    scheme = url.partition(":")[0].lower() if ":" in url[:12] else ""
    if scheme in ("http", "https"):
        raise _refused("this server fetches no URLs; send the image itself: data:image/jpeg;base64,…")
    if scheme:
        raise _refused(f"{scheme}: URLs are not opened; send the image itself: data:image/jpeg;base64,…")
    if len(url) < _SHORTEST:
        raise _refused("an image is a data URI: data:image/jpeg;base64,…")
    return _decoded(url.encode("ascii", "replace"))


def _decoded(text: bytes) -> bytes:
    """Base64, of both alphabets, with line breaks, and without padding."""
    packed = b"".join(text.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return _not_empty(base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True))
    except (binascii.Error, ValueError) as e:
        raise _refused(f"the image is not valid base64 ({e})") from e


def _not_empty(found: bytes) -> bytes:
    if not found:
        raise _refused("the image has no bytes")
    return found


def _refused(message: str) -> ApiError:
    return ApiError(400, message, "invalid_image", "messages")
