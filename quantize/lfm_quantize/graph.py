"""ONNX graphs as onnx-ir holds them: opened with their weights left in the data file, cut into parts that run alone,
written again.

Values are found by name: export gives every node and every constant the name of the module it comes from, and passes
keep those names.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from google.protobuf.message import DecodeError
from lfm_runtime.engine.execution import Execution
from lfm_runtime.engine.failures import failures_are_ours
from lfm_runtime.errors import EdgeError, unreadable
from lfm_runtime.formats.manifest import Edge
from numpy.typing import NDArray

Array = NDArray[Any]
FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
CONTRIB = "com.microsoft"
POSITION_TABLE = "vision.embeddings.position_embedding.weight"
"""The encoder's position table: interpolated by a product, which is not one of those that are quantized."""
DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, DecodeError, ir.serde.SerdeError)
"""What reading a damaged graph or array raises."""
INLINE_BYTES = 1 << 12
"""Smaller constants stay inside the protobuf."""
LARGE_BYTES = 1 << 20
"""From here on a constant starts at a multiple of 64 KiB in the data file (a page, on any device); below, of 64 bytes.
"""
_HANDED = "handed over"


class QuantizeError(EdgeError, ValueError):
    """The bundle, the recipe or the calibration data cannot be used."""


# ------------------------------------------------------------------------------------------------------------ reading


def open_graph(path: Path) -> ir.Model:
    """Read a graph. Weights are mapped from the file when they are used. Types and shapes stand at the edges alone:
    those inside would be wrong after a pass.

    Raises:
        QuantizeError: not a graph, or its data file does not hold what it names.
    """
    try:
        model = ir.load(path)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _mapped(value.const_value, path.parent)
    except DAMAGE as e:
        cause = e.__cause__ or e
        if isinstance(cause, OSError):
            raise unreadable(path, cause, QuantizeError, "copy the bundle again") from e
        reason = " ".join(str(cause).split())[:200]
        raise QuantizeError(f"{path} cannot be read ({reason}); export the bundle again") from e
    edges = {*model.graph.inputs, *model.graph.outputs}
    for value in [*model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]:
        if value not in edges:
            value.type = value.shape = None
    model.graph.opset_imports.setdefault(CONTRIB, 1)
    return model


def _mapped(tensor: ir.ExternalTensor, folder: Path) -> Mapped:
    """The tensor mapped. onnx-ir refuses data behind links, which the hub's cache and a bundle that is being replaced
    are made of; so the name is held against the folder here.
    """
    name = str(tensor.location)
    if Path(name).name != name:
        raise ValueError(f"{tensor.name} names the data file {name!r}, which is not beside the graph")
    file, offset, size = folder.resolve() / name, tensor.offset or 0, tensor.nbytes
    if (tensor.length or size) != size or offset + size > file.stat().st_size:
        raise ValueError(f"{name} is shorter than {tensor.name} says")
    return Mapped(file, offset, tensor)


def release(*mapped: ir.Model | Array) -> None:
    """Give back the memory of weights, or of arrays mapped from files, that were read: pages of a file count as ours
    while they are mapped.
    """
    for each in mapped:
        if isinstance(each, ir.Model):
            tensors = [value.const_value for value in each.graph.initializers.values()]
            release(*(t.mapped for t in tensors if isinstance(t, Mapped) and t.mapped is not None))
        elif isinstance(each, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
            each._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # noqa: SLF001  (numpy has no other way)


# ---------------------------------------------------------------------------------------------------------- constants


def constant(value: ir.Value | None) -> Array:
    """A constant's elements; mapped where they lie in a file."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


class Mapped(ir.LazyTensor):
    """A constant in a data file, mapped when it is used. (ir.ExternalTensor maps the whole file for each tensor: fifty
    times the weights in address space, which `ulimit -v` counts.)
    """

    def __init__(self, file: Path, offset: int, like: ir.TensorProtocol) -> None:
        self.file = file
        self.offset = offset
        self.mapped: Array | None = None
        super().__init__(self._map, like.dtype, ir.Shape(like.shape.numpy()), name=like.name)

    def _map(self) -> ir.TensorProtocol:
        packed = self.dtype == ir.DataType.UINT4
        if self.mapped is None:
            shape = (self.nbytes,) if packed else tuple(self.shape.numpy())
            kind = np.dtype(np.uint8) if packed else self.dtype.numpy()
            self.mapped = np.memmap(self.file, kind, "r", self.offset, shape)
        return ir.PackedTensor(self.mapped, self.dtype, shape=self.shape.numpy()) if packed else ir.Tensor(self.mapped)


class Retyped(ir.LazyTensor):
    """A constant read as another float type; the conversion is made each time its elements are asked for."""

    def __init__(self, origin: ir.TensorProtocol, dtype: ir.DataType) -> None:
        self.origin = origin

        def convert() -> ir.TensorProtocol:
            return ir.Tensor(origin.numpy().astype(dtype.numpy()))

        super().__init__(convert, dtype, ir.Shape(origin.shape.numpy()))


def retyped(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """The constant as another float type; the stored one where that is the type it is stored in."""
    origin = tensor.origin if isinstance(tensor, Retyped) else tensor
    return origin if origin.dtype == dtype else Retyped(origin, dtype)


def lazily(make: Callable[[], Array], dtype: ir.DataType, shape: Sequence[int]) -> ir.TensorProtocol:
    """A constant that `make` gives when it is asked for, so that one large array at a time is in memory. 4-bit
    elements are made packed, in pairs along the last axis.
    """

    def convert() -> ir.TensorProtocol:
        array = make()
        return ir.PackedTensor(array, dtype, shape=shape) if dtype == ir.DataType.UINT4 else ir.Tensor(array)

    return ir.LazyTensor(convert, dtype, ir.Shape(shape))


# ---------------------------------------------------------------------------------------------------- matrix products


@dataclass(frozen=True)
class Linear:
    """A matrix product with constant weights: output [rows, n] = input [rows, k] · W + bias."""

    name: str
    node: ir.Node
    weight: ir.Value
    by_output: bool  # stored [n, k], else [k, n]
    k: int
    n: int
    bias: str | None  # the constant's name; the decoder's biases are added by a node of their own

    @property
    def adds_bias(self) -> bool:
        """Whether the product's own node (Gemm) adds the bias."""
        return len(self.node.inputs) > 2

    @property
    def input(self) -> str:
        """Name of the value that is multiplied."""
        return str(self.node.inputs[0].name)  # type: ignore[union-attr]

    def weights(self) -> NDArray[np.float32]:
        """[n, k], float32, contiguous: an output channel is a row."""
        stored = constant(self.weight).astype(np.float32, copy=False)
        return np.ascontiguousarray(stored if self.by_output else stored.T)

    def stored(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weights [n, k] in the order that the graph keeps them in."""
        return weights if self.by_output else np.ascontiguousarray(weights.T)


def linears(model: ir.Model, nodes: Iterable[ir.Node] | None = None) -> dict[str, Linear]:
    """Matrix products with a constant, by node name, in order; of `nodes` alone where they are given. The position
    table is interpolated, not multiplied: left out.
    """
    found = {}
    for node in model.graph if nodes is None else nodes:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or weight.const_value is None or weight.name == POSITION_TABLE:
            continue
        by_output = "transB" in node.attributes and bool(node.attributes["transB"].as_int())
        shape = tuple(weight.const_value.shape.numpy())
        n, k = shape if by_output else shape[::-1]
        beside = model.graph.initializers.get(f"{node.name}.bias")
        added = node.inputs[2] if len(node.inputs) > 2 else beside
        bias = str(added.name) if added is not None else None
        found[str(node.name)] = Linear(str(node.name), node, weight, by_output, int(k), int(n), bias)
    return found


# -------------------------------------------------------------------------------------------------------------- parts


def reads(node: ir.Node) -> list[ir.Value]:
    """Every value a node takes, those that its branches take from outside included."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            made = {v for n in inner for v in n.outputs} | set(inner.initializers.values()) | set(inner.inputs)
            values += [v for n in inner for v in reads(n) if v not in made]
    return values


def nodes_between(model: ir.Model, outputs: Iterable[str], cut: Iterable[str] = ()) -> list[ir.Node]:
    """The nodes that compute `outputs` from `cut` and graph inputs, in order."""
    needed, cut = set(outputs), set(cut)
    nodes = []
    for node in reversed(model.graph):
        if needed.difference(cut).intersection(v.name for v in node.outputs):
            nodes.append(node)
            needed.update(str(v.name) for v in reads(node))
    return nodes[::-1]


def part(
    model: ir.Model, outputs: Sequence[str], cut: Sequence[str] = (), like: Mapping[str, Array] = MappingProxyType({})
) -> ir.Model:
    """A copy of what computes `outputs` from `cut` (float32 values) and whatever graph inputs that needs. `like`: a
    value of each in `cut`. Of its shape the rank and the last dimension are told: onnxruntime up to 1.23 takes a wrong
    one from reshaped values without a rank, and refuses the graph.
    """
    nodes = nodes_between(model, outputs, cut)
    values = {v.name: v for v in model.graph.inputs} | {v.name: v for node in model.graph for v in node.outputs}
    needed = set(outputs).union(str(v.name) for node in nodes for v in reads(node))
    inputs = [v for v in model.graph.inputs if v.name in needed]
    inputs += [values[name] for name in sorted(needed.intersection(cut)) if values[name] not in inputs]
    view = ir.GraphView(
        inputs,
        [values[name] for name in outputs],
        nodes=nodes,
        initializers=[v for name, v in model.graph.initializers.items() if name in needed],
        opset_imports=model.graph.opset_imports,
        name=model.graph.name,
    )
    graph = view.clone()
    for value in graph.inputs:
        value.type = value.type or ir.TensorType(FLOAT)
        if value.shape is None and (known := like.get(str(value.name))) is not None:
            *others, last = known.shape
            value.shape = ir.Shape([*[None] * len(others), last])
    return ir.Model(graph, ir_version=model.ir_version, functions=[f.clone() for f in model.functions.values()])


# ------------------------------------------------------------------------------------------------------------ running


def session(model: ir.Model, threads: int) -> ort.InferenceSession:
    """Run it. Constants of the bundle are used where their file is mapped; new ones are copied; fp32 ones are not
    packed.
    """
    options = Execution(threads).options()
    # Packing an fp32 weight would keep a second copy of it, and a calibration run is short; without packing MatMulNBits
    # crawls.
    quantized = any(n.op_type in ("MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat") for n in model.graph)
    options.add_session_config_entry("session.disable_prepacking", "0" if quantized else "1")
    tensors = {name: v.const_value for name, v in model.graph.initializers.items()}
    # Where links lead to: onnxruntime, which is given no graph's file, takes none out of the folder.
    files = {name: tensor.file.resolve() for name, tensor in tensors.items() if isinstance(tensor, Mapped)}
    folder = next((file.parent for file in files.values()), Path())
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder) if files else ""
    )
    written: dict[str, ir.TensorProtocol] = {}
    handed: dict[str, ort.OrtValue] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Mapped) and files[name].parent == folder:
            written[name] = _at(tensor, files[name].name, tensor.offset)
        elif tensor is not None and tensor.nbytes >= INLINE_BYTES:
            written[name] = _at(tensor, _HANDED, 0)
            handed[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy()))
    options.add_external_initializers(list(handed), list(handed.values()))
    with failures_are_ours(str(model.graph.name)):
        return ort.InferenceSession(_serialized(model, written), options, providers=["CPUExecutionProvider"])


# ------------------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Written:
    """Where a graph's constants went."""

    places: Mapping[str, ir.ExternalTensor]  # by the constant's name, in files of the graph's folder

    @property
    def files(self) -> list[str]:
        """Names of the data files."""
        return sorted({str(tensor.location) for tensor in self.places.values()})


def save(
    model: ir.Model, path: Path, shared: Mapping[str, ir.ExternalTensor] | None = None, *, over: bool = False
) -> Written:
    """Write `path` and, for larger constants, `path`_data.

    Args:
        model: it is left as it is.
        path: of the protobuf.
        shared: constants whose bytes are in another file of that folder already.
        over: constants mapped from a file stay in it; it lies, or will lie, in that folder too.
    """
    places: dict[str, ir.ExternalTensor] = {}
    inside: dict[str, ir.TensorProtocol] = {}
    data = path.with_name(f"{path.name}_data")
    with data.open("wb") as file:
        for name, tensor in [(n, v.const_value) for n, v in model.graph.initializers.items()]:
            assert tensor is not None, name
            if shared and name in shared:
                places[name] = _at(tensor, str(shared[name].location), shared[name].offset or 0)
            elif over and isinstance(tensor, Mapped):
                places[name] = _at(tensor, tensor.file.name, tensor.offset)
            elif tensor.nbytes >= INLINE_BYTES:
                step = 1 << 16 if tensor.nbytes >= LARGE_BYTES else 64
                start = -(-file.tell() // step) * step
                file.truncate(start)
                file.seek(start)
                tensor.tofile(file)  # type: ignore[attr-defined]  # every tensor of onnx-ir has it
                places[name] = _at(tensor, data.name, start)
            elif isinstance(tensor, Mapped):  # others keep small ones in a file, too
                inside[name] = ir.Tensor(tensor.numpy(), dtype=tensor.dtype)
    if not data.stat().st_size:
        data.unlink()
    path.write_bytes(_serialized(model, {**inside, **places}))
    return Written(places)


def _at(tensor: ir.TensorProtocol, file: str, offset: int) -> ir.ExternalTensor:
    """The tensor as one that lies in a file of the graph's folder."""
    return ir.ExternalTensor(
        file, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name or ""
    )


def _serialized(model: ir.Model, tensors: Mapping[str, ir.TensorProtocol]) -> bytes:
    """The protobuf, with other tensors for some of the constants."""
    kept = {name: value.const_value for name, value in model.graph.initializers.items()}
    try:
        for name, value in model.graph.initializers.items():
            value.const_value = tensors.get(name, kept[name])
        model.producer_name = "lfm-edge"
        return bytes(ir.to_proto(model).SerializeToString())
    finally:
        for name, value in model.graph.initializers.items():
            value.const_value = kept[name]


def edges(model: ir.Model) -> tuple[dict[str, Edge], dict[str, Edge]]:
    """(inputs, outputs) for the manifest."""

    def described(values: Iterable[ir.Value]) -> Iterator[tuple[str, Edge]]:
        for value in values:
            assert value.dtype is not None
            assert value.shape is not None
            dims = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
            yield str(value.name), Edge(value.dtype.name, dims)

    return dict(described(model.graph.inputs)), dict(described(model.graph.outputs))
