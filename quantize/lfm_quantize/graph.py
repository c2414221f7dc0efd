"""An ONNX graph taken apart: nodes as a list, constants as arrays mapped from the data file.

Quantizing needs three things of a graph: parts of it to run alone, its matrix products by name, and to be written again
with some nodes replaced. All three are plain list work on names, so nodes stay protobufs.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from lfm_runtime.engine.execution import Execution
from lfm_runtime.engine.failures import failures_are_ours
from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.manifest import Edge
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]
_HANDED = "handed over"
FLOAT, FLOAT16, INT64, UINT4 = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.INT64,
    onnx.TensorProto.UINT4,
)
DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, DecodeError)
"""What reading a damaged graph or array raises."""
CONTRIB = "com.microsoft"
INLINE_BYTES = 1 << 12
"""Smaller constants stay inside the protobuf."""
LARGE_BYTES = 1 << 20
"""From here on a constant starts at a multiple of 64 KiB in the data file (a page, on any device); below, of 64 bytes.
"""


class QuantizeError(EdgeError, ValueError):
    """The bundle, the recipe or the calibration data cannot be used."""


class Place(NamedTuple):
    """Where a constant's bytes lie."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True)
class Tensor:
    """A constant: elements of `dtype` in `shape`; `data` may be of another float type (read as `dtype`) or hold packed
    4-bit pairs.
    """

    data: Array
    dtype: int
    shape: tuple[int, ...]
    place: Place | None = None  # in a file beside the one being written
    source: Path | None = None  # the file that `data` is mapped from, all of it at `offset`
    offset: int = 0

    @staticmethod
    def of(data: Array, dtype: int | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """A constant from an array; name `dtype` and `shape` where the array's own do not say it."""
        return Tensor(
            data,
            dtype or helper.np_dtype_to_tensor_dtype(data.dtype),
            tuple(shape if shape is not None else data.shape),
        )

    @property
    def array(self) -> Array:
        """The elements in their own type."""
        return (
            self.data
            if self.dtype == UINT4
            else self.data.astype(helper.tensor_dtype_to_np_dtype(self.dtype), copy=False)
        )


@dataclass(frozen=True)
class Linear:
    """A matrix product with constant weights: output [rows, n] = input [rows, k] · W + bias."""

    name: str
    node: onnx.NodeProto
    weight: str
    by_output: bool  # stored [n, k], else [k, n]
    k: int
    n: int
    bias: str | None  # the tensor's name; the decoder's biases are added by a node of their own

    @property
    def adds_bias(self) -> bool:
        """Whether the product's own node (Gemm) adds the bias."""
        return len(self.node.input) > 2


@dataclass
class Graph:
    """Nodes in order, constants by name, and the edges."""

    name: str
    nodes: list[onnx.NodeProto]
    tensors: dict[str, Tensor]
    inputs: dict[str, onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]
    opset: int = 20
    ir_version: int = 10
    metadata: Mapping[str, str] = field(default_factory=dict)
    functions: Sequence[onnx.FunctionProto] = ()  # what operators are where an engine does not have them

    @staticmethod
    def open(path: Path, *, widen: bool = True) -> Graph:
        """Read a graph; weights stay in the file until they are used. With `widen`, an fp16 graph becomes the fp32 one
        it is made of.

        Raises:
            QuantizeError: not a graph, or its data file does not hold what it names.
        """
        try:
            model = onnx.load(str(path), load_external_data=False)
            tensors = {t.name: _read(t, path.parent) for t in model.graph.initializer}
            opset = {o.domain or "ai.onnx": o.version for o in model.opset_import}["ai.onnx"]
        except DAMAGE as e:
            raise QuantizeError(
                f"{path} cannot be read ({' '.join(str(e).split())[:200]}); export the bundle again"
            ) from e
        graph = Graph(
            model.graph.name,
            list(model.graph.node),
            tensors,
            {v.name: v for v in model.graph.input},
            list(model.graph.output),
            opset,
            model.ir_version,
            functions=list(model.functions),
        )
        if widen:
            _widen(graph)
        return graph

    def linears(self) -> dict[str, Linear]:
        """Matrix products with a constant, by node name, in order. The position table is interpolated, not multiplied:
        left out.
        """
        found = {}
        for node in self.nodes:
            if (
                node.op_type not in ("MatMul", "Gemm")
                or node.input[1] not in self.tensors
                or node.name == "vision.positions"
            ):
                continue
            by_output = any(a.name == "transB" and a.i for a in node.attribute)
            shape = self.tensors[node.input[1]].shape
            n, k = shape if by_output else shape[::-1]
            beside = f"{node.name}.bias" if f"{node.name}.bias" in self.tensors else None
            bias = node.input[2] if len(node.input) > 2 else beside
            found[node.name] = Linear(node.name, node, node.input[1], by_output, k, n, bias)
        return found

    def weight(self, linear: Linear) -> NDArray[np.float32]:
        """[n, k], float32, contiguous: an output channel is a row."""
        stored = self.tensors[linear.weight].array.astype(np.float32, copy=False)
        return np.ascontiguousarray(stored if linear.by_output else stored.T)

    def part(self, outputs: Iterable[str], cut: Iterable[str] = ()) -> Graph:
        """The graph that computes `outputs` from `cut` (float32 values) and whatever graph inputs that needs."""
        wanted, cut, outputs = set(outputs), set(cut), list(outputs)
        nodes: list[onnx.NodeProto] = []
        needed = set(wanted)
        for node in reversed(self.nodes):
            if not set(node.output).intersection(needed - cut):
                continue
            nodes.append(node)
            needed |= reads(node)
        made = {name for node in nodes for name in node.output}
        inputs = {name: info for name, info in self.inputs.items() if name in needed}
        inputs |= {
            name: helper.make_tensor_value_info(name, FLOAT, None)
            for name in sorted(cut & needed)
            if name not in inputs
        }
        dangling = needed - made - inputs.keys() - self.tensors.keys()
        assert not dangling, dangling
        known = {v.name: v for v in self.outputs}
        return replace(
            self,
            nodes=nodes[::-1],
            inputs=inputs,
            tensors={n: t for n, t in self.tensors.items() if n in needed},
            outputs=[
                known.get(name) or onnx.ValueInfoProto(name=name) for name in outputs
            ],  # onnxruntime infers the type
        )

    def replaced(self, nodes: Mapping[str, Sequence[onnx.NodeProto]], tensors: Mapping[str, Tensor]) -> Graph:
        """A copy with the named nodes replaced by others, constants added or replaced, and unused ones dropped."""
        new = [n for node in self.nodes for n in nodes.get(node.name, (node,))]
        both = {**self.tensors, **tensors}
        used = set().union(*(reads(node) for node in new))
        return replace(self, nodes=new, tensors={n: t for n, t in both.items() if n in used})

    def release(self) -> None:
        """Give back the memory of weights that were read: pages of the file count as ours while they are mapped."""
        for tensor in self.tensors.values():
            if isinstance(tensor.data, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
                tensor.data._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # noqa: SLF001  (numpy has no other way)

    def edges(self) -> tuple[dict[str, Edge], dict[str, Edge]]:
        """(inputs, outputs) for the manifest."""

        def describe(info: onnx.ValueInfoProto) -> Edge:
            kind = info.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
            return Edge(onnx.TensorProto.DataType.Name(kind.elem_type), shape)

        return {n: describe(i) for n, i in self.inputs.items()}, {o.name: describe(o) for o in self.outputs}

    def data_files(self, name: str) -> set[str]:
        """Names of the data files that `save` under `name` uses."""
        return {
            t.place.file if t.place else f"{name}_data"
            for t in self.tensors.values()
            if t.place or t.data.nbytes >= INLINE_BYTES
        }

    def session(self, threads: int) -> ort.InferenceSession:
        """Run it. Constants of the bundle are used where their file is mapped; new ones are copied; fp32 ones are not
        packed.
        """
        options = Execution(threads).options()
        # Packing an fp32 weight would keep a second copy of it, and a calibration run is short; without packing
        # MatMulNBits crawls.
        quantized = any(n.op_type in ("MatMulNBits", "DynamicQuantizeMatMul") for n in self.nodes)
        options.add_session_config_entry("session.disable_prepacking", "0" if quantized else "1")
        folders = {t.source.parent for t in self.tensors.values() if t.source}
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(next(iter(folders), ""))
        )

        def place(_: str, tensor: Tensor) -> Place:
            as_stored = tensor.source and tensor.data.dtype == helper.tensor_dtype_to_np_dtype(tensor.dtype)
            return (
                Place(tensor.source.name, tensor.offset, tensor.data.nbytes)
                if tensor.source and as_stored
                else Place(_HANDED, 0, 0)
            )

        model, external = self._proto(place)
        handed = [t.name for t in model.graph.initializer if t.name in external and t.external_data[0].value == _HANDED]
        values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(self.tensors[name].array)) for name in handed]
        options.add_external_initializers(handed, values)
        with failures_are_ours(self.name):
            return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _proto(self, place: Callable[[str, Tensor], Place]) -> tuple[onnx.ModelProto, list[str]]:
        """The protobuf, and the names of constants that are not in it but where `place` says."""
        large: list[str] = []
        protos = []
        for name, tensor in self.tensors.items():
            if tensor.place is None and tensor.data.nbytes < INLINE_BYTES:
                protos.append(
                    helper.make_tensor(
                        name, tensor.dtype, tensor.shape, np.ascontiguousarray(tensor.array).tobytes(), raw=True
                    )
                )
                continue
            large.append(name)
            at = place(name, tensor)
            proto = onnx.TensorProto(
                name=name, data_type=tensor.dtype, dims=tensor.shape, data_location=onnx.TensorProto.EXTERNAL
            )
            for key, value in (("location", at.file), ("offset", str(at.offset)), ("length", str(at.size))):
                proto.external_data.add(key=key, value=value)
            protos.append(proto)
        graph = helper.make_graph(self.nodes, self.name, list(self.inputs.values()), self.outputs, protos)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=self.ir_version,
            producer_name="lfm-edge",
            functions=list(self.functions),
        )
        helper.set_model_props(model, dict(self.metadata))
        return model, large

    def save(self, path: Path) -> dict[str, Place]:
        """Write `path` and `path`_data; returns where each constant went, for graphs that share some."""
        places: dict[str, Place] = {}
        data = path.with_name(f"{path.name}_data")
        with data.open("wb") as file:

            def place(name: str, tensor: Tensor) -> Place:
                if tensor.place is None:
                    array = np.ascontiguousarray(tensor.array)
                    step = 1 << 16 if array.nbytes >= LARGE_BYTES else 64
                    file.seek(-(-file.tell() // step) * step)
                    places[name] = Place(data.name, file.tell(), array.nbytes)
                    file.write(array.data)
                else:
                    places[name] = tensor.place
                return places[name]

            model, _ = self._proto(place)
        if not data.stat().st_size:
            data.unlink()
        path.write_bytes(model.SerializeToString())
        return places


def _read(proto: onnx.TensorProto, folder: Path) -> Tensor:
    if proto.data_location != onnx.TensorProto.EXTERNAL:
        return Tensor.of(numpy_helper.to_array(proto))
    where = {entry.key: entry.value for entry in proto.external_data}
    packed = proto.data_type == UINT4
    kind = np.dtype(np.uint8) if packed else helper.tensor_dtype_to_np_dtype(proto.data_type)
    shape = ((int(np.prod(proto.dims)) + 1) // 2,) if packed else tuple(proto.dims)
    data = np.memmap(folder / where["location"], kind, "r", int(where.get("offset", 0)), shape)
    return Tensor(
        data, proto.data_type, tuple(proto.dims), source=folder / where["location"], offset=int(where.get("offset", 0))
    )


def _widen(graph: Graph) -> None:
    """An fp16 graph of ours is the fp32 one with other types and some casts: change the types back."""
    graph.tensors = {n: replace(t, dtype=FLOAT) if t.dtype == FLOAT16 else t for n, t in graph.tensors.items()}
    for info in (*graph.inputs.values(), *graph.outputs):
        if info.type.tensor_type.elem_type == FLOAT16:
            info.type.tensor_type.elem_type = FLOAT
    for node in _all_nodes(graph.nodes):
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT16:
                attribute.i = FLOAT


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _all_nodes(attribute.g.node)


def reads(node: onnx.NodeProto) -> set[str]:
    """Every name a node takes, branches included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inner = attribute.g.node
            made = {name for n in inner for name in n.output}
            names |= set().union(*(reads(n) for n in inner)) - made - {t.name for t in attribute.g.initializer}
    return names
