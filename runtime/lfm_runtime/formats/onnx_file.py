"""What an ONNX file says of its nodes and of where its weights lie, read without the onnx package: a device has none.

ONNX is protocol buffers: fields of (number, kind, value), where messages nest. What is not asked for is skipped by its
length. Field
numbers: onnx.proto of ONNX 1.17.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lfm_runtime.errors import BundleError, unreadable
from lfm_runtime.formats.files import check_no_pointer

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
_LOCATION, _OFFSET, _SIZE = b"location", b"offset", b"length"
_DEEPEST = 64
_EXTERNAL = 13
_GRAPH, _NODE, _TENSOR, _TENSOR_NAME, _GRAPH_OUTPUT, _VALUE_NAME = 7, 1, 5, 8, 12, 1
_INPUT, _OUTPUT, _NAME, _OP_TYPE = 1, 2, 3, 4


@dataclass(frozen=True)
class Node:
    """A node of a graph."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def external_files(path: Path) -> set[str]:
    """Names of all files that a graph's tensors lie in, as the graph gives them.

    Raises:
        BundleError: the file is not an ONNX graph, or is cut off.
    """
    return {value.decode() for key, value in _read(path) if key == _LOCATION}


@lru_cache
def check_external_files(path: Path) -> None:
    """Raise BundleError where a file that a graph's tensors lie in is missing, or ends before they do. What was found
    sound is not looked at again: graphs are asked for many times, and some hold all their weights.
    """
    with _damage_is_ours(path):
        needed: dict[str, int] = {}
        for kind, message in _walk(memoryview(path.read_bytes()), "model", 0):
            told = (
                dict(_entry(value) for number, value in _fields(message) if number == _EXTERNAL)
                if kind == "tensor"
                else {}
            )
            if _LOCATION in told:
                name = told[_LOCATION].decode()
                needed[name] = max(needed.get(name, 0), int(told.get(_OFFSET, 0)) + int(told.get(_SIZE, 0)))
    for name, size in needed.items():
        file = path.parent / name
        if not file.exists():
            raise BundleError(f"{file} is missing, where {path.name} has its weights; copy it there")
        check_no_pointer(file, BundleError)
        if (there := file.stat().st_size) < size:
            raise BundleError(f"{file} is cut off: it has {there} bytes, {path.name} reads {size}; copy it again")


def external_bytes(path: Path) -> int:
    """Size of all tensors that lie in other files.

    Raises:
        BundleError: see external_files.
    """
    return sum(int(value) for key, value in _read(path) if key == _SIZE)


def _read(path: Path) -> list[tuple[bytes, bytes]]:
    """(key, value) of all that a graph says of its external data."""
    with _damage_is_ours(path):
        found = _walk(memoryview(path.read_bytes()), "model", 0)
        return [_entry(message) for kind, message in found if kind == "entry"]


@contextmanager
def _damage_is_ours(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise unreadable(path, e, BundleError, "copy the bundle again") from e
    except (IndexError, ValueError, StopIteration) as e:
        check_no_pointer(path, BundleError)
        raise BundleError(f"{path} is not an ONNX graph, or is cut off ({e}); copy the bundle again") from e


def _graph(path: Path) -> memoryview:
    with _damage_is_ours(path):
        return next(value for number, value in _fields(memoryview(path.read_bytes())) if number == _GRAPH)


def _nodes(path: Path) -> list[Node]:
    graph = _graph(path)
    with _damage_is_ours(path):
        return [_node(value) for number, value in _fields(graph) if number == _NODE]


def host_nodes(path: Path) -> set[str]:
    """Names of the nodes that compute with shapes and constants alone, which belong on the CPU wherever the graph is
    run.

    Raises:
        BundleError: see external_files.
    """
    known: set[str] = set()  # values that come from shapes and constants
    found = set()
    graph = _graph(path)
    with _damage_is_ours(path):
        for number, value in _fields(graph):
            if number == _TENSOR:
                known.update(bytes(v).decode() for n, v in _fields(value) if n == _TENSOR_NAME)
    for node in _nodes(path):
        if node.op_type in ("Shape", "Size") or {name for name in node.inputs if name} <= known:
            known.update(node.outputs)
            found.add(node.name)
    return found


def output_names(path: Path) -> set[str]:
    """Names of a graph's outputs.

    Raises:
        BundleError: see external_files.
    """
    graph = _graph(path)
    with _damage_is_ours(path):
        outputs = [value for number, value in _fields(graph) if number == _GRAPH_OUTPUT]
        return {bytes(name).decode() for value in outputs for number, name in _fields(value) if number == _VALUE_NAME}


def node_count(path: Path) -> int:
    """How many nodes a graph has, those in its branches and functions not counted.

    Raises:
        BundleError: see external_files.
    """
    return len(_nodes(path))


def operators(path: Path, *, nested: bool = False) -> set[str]:
    """Types of the operators in a graph; `nested`: those in its branches and functions too.

    Raises:
        BundleError: see external_files.
    """
    if not nested:
        return {node.op_type for node in _nodes(path)}
    with _damage_is_ours(path):
        found = _walk(memoryview(path.read_bytes()), "model", 0)
        return {_node(message).op_type for kind, message in found if kind == "node"}


def edges_of(path: Path, op_type: str) -> set[str]:
    """Names of all values that the operators of a type read or write.

    Raises:
        BundleError: see external_files.
    """
    return {name for node in _nodes(path) if node.op_type == op_type for name in (*node.inputs, *node.outputs)}


def _node(message: memoryview) -> Node:
    texts: dict[int, list[str]] = {number: [] for number in (_INPUT, _OUTPUT, _NAME, _OP_TYPE)}
    for number, value in _fields(message):
        if number in texts:
            texts[number].append(bytes(value).decode())
    return Node("".join(texts[_NAME]), "".join(texts[_OP_TYPE]), tuple(texts[_INPUT]), tuple(texts[_OUTPUT]))


def _walk(message: memoryview, kind: str, depth: int) -> Iterator[tuple[str, memoryview]]:
    """(kind, message) of a message and of all that it holds, as deep as _WAYS leads."""
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    yield kind, message
    ways = _WAYS.get(kind, {})
    for number, value in _fields(message) if ways else ():
        if number in ways:
            yield from _walk(value, ways[number], depth + 1)


def _entry(message: memoryview) -> tuple[bytes, bytes]:
    fields = {number: bytes(value) for number, value in _fields(message)}
    return fields.get(1, b""), fields.get(2, b"")


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
