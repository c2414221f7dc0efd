"""JPEG and PNG pictures out of a stream of bytes, each as soon as its last byte is there.

Own code, since ffmpeg's parser of MJPEG gives a picture only when the next one begins: a camera with a picture every
ten seconds would be looked at ten seconds late. Formats: ITU-T T.81 annex B (JPEG's markers), the PNG specification,
section 5 (chunks).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_BEGIN = re.compile(re.escape(_JPEG) + b"|" + re.escape(_PNG))
_MARKER = re.compile(b"\xff[^\x00\xff\xd0-\xd7]")  # that ends a scan: no stuffed byte, no fill, no restart
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length


class NoPictureError(Exception):
    """A stream has no picture for longer than one can be."""


class _BrokenError(Exception):
    """What began like a picture is none."""


class _EndError(Exception):
    """The stream is over."""


def pictures(chunks: Iterator[bytes], *, most: int) -> Iterator[bytes]:
    """The files of a stream, one after the other; what is between them (the headers of a multipart stream) is skipped,
    and so is a picture that is cut off by the next one.

    Args:
        chunks: what was read, in parts of any size.
        most: bytes that a picture, or what is between two of them, may have.

    Raises:
        NoPictureError: there are more.
    """
    stream = _Stream(chunks, most)
    try:
        while True:
            stream.drop(stream.begin())
            try:
                end = stream.png_end() if stream.has(0, 8) == _PNG else stream.jpeg_end()
            except _BrokenError:
                stream.drop(1)
                continue
            yield stream.drop(end)
    except _EndError:
        return


class _Stream:
    """Bytes from where a picture begins on; more are read as they are asked for."""

    def __init__(self, chunks: Iterator[bytes], most: int) -> None:
        self._chunks, self._most = chunks, most
        self._bytes = bytearray()
        self._dropped = 0  # since the last picture

    def has(self, at: int, length: int) -> bytes:
        """Bytes at a place."""
        while len(self._bytes) < at + length:
            self._more()
        return bytes(self._bytes[at : at + length])

    def drop(self, length: int) -> bytes:
        """Take bytes away from the front."""
        found = bytes(self._bytes[:length])
        del self._bytes[:length]
        return found

    def begin(self) -> int:
        """Where the next picture begins."""
        skipped = 0
        while not (found := _BEGIN.search(self._bytes)):
            gone = max(0, len(self._bytes) - len(_PNG))
            skipped += len(self.drop(gone))
            if skipped > self._most:
                raise NoPictureError
            self._more()
        return found.start()

    def png_end(self) -> int:
        """Length of the PNG file at the front."""
        at = len(_PNG)
        while True:
            head = self.has(at, 8)
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if not kind.isalpha() or length > self._most:
                raise _BrokenError
            at += 12 + length  # length, kind, content, checksum
            if kind == b"IEND":
                self.has(0, at)
                return at

    def jpeg_end(self) -> int:
        """Length of the JPEG file at the front. A thumbnail in a segment is skipped with it."""
        at = 2
        while True:
            lead, marker = self.has(at, 2)
            if lead != 0xFF or marker in (0x00, _SOI):
                raise _BrokenError
            if marker == 0xFF:  # fill
                at += 1
                continue
            at += 2
            if marker == _EOI:
                return at
            if marker in _ALONE:
                continue
            length = int.from_bytes(self.has(at, 2), "big")
            if length < 2:
                raise _BrokenError
            at += length
            if marker == _SOS:
                at = self._scan_end(at)

    def _scan_end(self, at: int) -> int:
        while not (found := _MARKER.search(self._bytes, at)):
            at = max(at, len(self._bytes) - 1)
            self._more()
        return found.start()

    def _more(self) -> None:
        if len(self._bytes) > self._most:
            raise NoPictureError
        chunk = next(self._chunks, None)
        if chunk is None:
            raise _EndError
        self._bytes += chunk
