"""Graphs from plain calls: `g.MatMul(x, w)` adds a node; `g.weight(...)` streams a tensor into the graph's data file.

Large tensors go to `<graph>.onnx_data`, each at a multiple of 64 KiB (Pi 5 maps 16 KiB pages, some servers 64 KiB);
small ones stay inside the protobuf. A weight is produced when it is written, so one at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lfm_export.checkpoint.config import CheckpointError

ALIGNMENT = 1 << 16
INLINE_BYTES = 1 << 15
OPSET = 20  # Gelu with approximate=tanh; onnxruntime 1.20 knows up to 21
IR_VERSION = 10  # the newest that onnxruntime 1.20 reads
CONTRIB = "com.microsoft"

Array = NDArray[Any]
Operand = ir.Value | Array | Sequence[int] | float
Progress = Callable[[str, int], None]  # (tensor name, bytes written)

_DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
_NUMPY = {"fp32": np.float32, "fp16": np.float16}


class DataFile:
    """An external data file being written; `place` returns where a tensor went."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.file = path.open("wb")
        self.progress = progress

    def write(self, name: str, pieces: Iterable[Array]) -> tuple[int, int]:
        """Append a tensor; returns (offset, bytes)."""
        offset = -(-self.file.tell() // ALIGNMENT) * ALIGNMENT
        self.file.truncate(offset)
        self.file.seek(offset)
        for piece in pieces:
            self.file.write(np.ascontiguousarray(piece).data)
        size = self.file.tell() - offset
        self.progress(name, size)
        return offset, size

    def close(self) -> None:
        """End the file; the bundle writer syncs it to the disk."""
        self.file.close()


class GraphBuilder:
    """One ONNX graph under construction. `dtype`: of weights and activations inside; see `cast` for the edges."""

    def __init__(self, name: str, data: DataFile, dtype: str) -> None:
        self.name = name
        self.data = data
        self.dtype = dtype
        self.float_type = _DTYPES[dtype]
        self.numpy_type = _NUMPY[dtype]
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.initializers: dict[str, ir.Value] = {}
        self.functions: dict[str, ir.Function] = {}
        self._names: dict[str, int] = {}

    # ------------------------------------------------------------------------------------------------ edges

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input; a string in `shape` is a free axis."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make `value` a graph output called `name`."""
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self.outputs.append(value)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` as `dtype`; nothing is added in fp32 graphs where it has that type already."""
        return value if self.float_type == ir.DataType.FLOAT else self.op("Cast", value, to=int(dtype))

    # ---------------------------------------------------------------------------------------------- weights

    def weight(self, name: str, shape: Sequence[int], produce: Callable[[], Array | Iterable[Array]]) -> ir.Value:
        """A constant of `shape` in the graph's float type; `produce` gives it whole or in flat pieces, when asked."""
        if name in self.initializers:
            return self.initializers[name]
        produced = produce()
        pieces = [produced] if isinstance(produced, np.ndarray) else produced
        typed = (self._typed(piece, name) for piece in pieces)
        count = int(np.prod(shape, dtype=np.int64))
        tensor: ir.TensorProtocol
        if count * np.dtype(self.numpy_type).itemsize < INLINE_BYTES:
            whole = np.concatenate([p.reshape(-1) for p in typed]).reshape(tuple(shape))
            tensor = ir.Tensor(whole, name=name)
            self.data.progress(name, whole.nbytes)
        else:
            offset, size = self.data.write(name, typed)
            tensor = ir.ExternalTensor(
                self.data.path.name, offset, size, self.float_type, shape=ir.Shape(shape), name=name
            )
        return self._initializer(name, tensor)

    def _typed(self, piece: Array, name: str) -> Array:
        if self.dtype == "fp16" and np.abs(piece).max(initial=0) > np.finfo(np.float16).max:
            raise CheckpointError(
                f"{name} has the value {np.abs(piece).max():g}, which overflows fp16; leave --dtype fp16 out"
            )
        return piece.astype(self.numpy_type, copy=False)

    def shared_weight(self, name: str, shape: Sequence[int], other: ir.ExternalTensor) -> ir.Value:
        """A constant whose bytes lie in another graph's data file in the same folder."""
        return self._initializer(
            name,
            ir.ExternalTensor(
                other.location, other.offset, other.length, other.dtype, shape=ir.Shape(shape), name=name
            ),
        )

    def constant(self, value: Array | Sequence[int] | float, name: str | None = None) -> ir.Value:
        """Integers become int64; floats take the graph's float type; arrays keep theirs."""
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
        if not isinstance(value, np.ndarray):
            array = array.astype(self.numpy_type if array.dtype.kind == "f" else np.int64)
        name = name or f"const.{array.dtype.name}.{'x'.join(map(str, array.shape))}.{array.tobytes().hex()[:48]}"
        if name in self.initializers:
            return self.initializers[name]
        return self._initializer(name, ir.Tensor(array, name=name))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.initializers[name] = value
        return value

    # ------------------------------------------------------------------------------------------------ nodes

    def op(
        self, op_type: str, *operands: Operand | None, name: str | None = None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node with one output; None leaves an optional input out."""
        return self.ops(op_type, 1, *operands, name=name, domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        outputs: int,
        *operands: Operand | None,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs; returns them."""
        inputs = [x if x is None or isinstance(x, ir.Value) else self.constant(x) for x in operands]
        label = self._unique(name or op_type)
        attrs = [
            ir.AttrGraph(k, v) if isinstance(v, ir.Graph) else ir.convenience.convert_attribute(k, v)
            for k, v in attributes.items()
        ]
        node = ir.Node(domain, op_type, inputs, attrs, num_outputs=outputs, name=label)
        for i, value in enumerate(node.outputs):
            value.name = label if outputs == 1 else f"{label}.{i}"
        self.nodes.append(node)
        return node.outputs

    def brings(self, function: ir.Function) -> None:
        """The graph uses this operator, and has its function with it. One of a name."""
        self.functions.setdefault(function.name, function)

    def subgraph(self, name: str, build: Callable[[], ir.Value]) -> ir.Graph:
        """A branch of If: `build` adds nodes that may use any value of the enclosing graph, and returns the result."""
        outer, self.nodes = self.nodes, []
        result = build()
        graph = ir.Graph([], [result], nodes=self.nodes, name=name)
        self.nodes = outer
        return graph

    def _unique(self, label: str) -> str:
        n = self._names.get(label, 0)
        self._names[label] = n + 1
        return label if n == 0 else f"{label}.{n}"

    # ---------------------------------------------------------------------------------------------- finish

    def save(self, path: Path) -> None:
        """Write the protobuf; the data file is already there."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            name=self.name,
            opset_imports={"": OPSET, CONTRIB: 1},
        )
        functions = list(self.functions.values())
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="lfm-edge", functions=functions)
        ir.save(model, path)
