"""Where an ONNX file says its weights lie, read without the onnx package: a device has none.

ONNX is protocol buffers: fields of (number, kind, value), where messages nest. Only the way to external data is followed; everything
else is skipped by its length. Field numbers: onnx.proto of ONNX 1.17.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lfm_runtime.errors import BundleError

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# message → field number → message it holds
_WAYS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "tensor": {13: "entry"},
}
_LOCATION = b"location"
_DEEPEST = 64


def external_files(path: Path) -> set[str]:
    """Names of all files that a graph's tensors lie in, as the graph gives them.

    Raises:
        BundleError: the file is not an ONNX graph, or is cut off.
    """
    try:
        return set(_locations(memoryview(path.read_bytes()), "model", 0))
    except (IndexError, ValueError) as e:
        raise BundleError(f"{path} is not an ONNX graph, or is cut off ({e}); copy the bundle again") from e


def _locations(message: memoryview, kind: str, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    if kind == "entry":
        fields = {number: bytes(value) for number, value in _fields(message)}
        if fields.get(1) == _LOCATION:
            yield fields.get(2, b"").decode()
        return
    ways = _WAYS[kind]
    for number, value in _fields(message):
        if number in ways:
            yield from _locations(value, ways[number], depth + 1)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of the fields that have a length; the others are numbers, which nothing here asks for."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        elif kind == _LENGTH:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("a field ends after its message")
            yield number, message[at : at + length]
            at += length
        else:
            raise ValueError(f"field {number} is of no known kind")
    if at > len(message):
        raise ValueError("a field ends after its message")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number has no end")
