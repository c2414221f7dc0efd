"""Operators that newer releases of onnxruntime have kernels for, as functions of standard operators for the others.

A graph brings along the functions of what it uses. onnxruntime takes its own kernel where it has one, on CPUs and CUDA
(`CausalConvWithState` since 1.25, `BranchwiseRMSNorm` since 1.31), and puts the function's nodes in the call's place
where it has none. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lfm_export.builder import CONTRIB, OPSET

CONVOLUTION, HEAD_NORM = "CausalConvWithState", "BranchwiseRMSNorm"
_END = np.iinfo(np.int64).max
_FLOAT = ir.DataType.FLOAT


class _Body:
    """The nodes of a function, from plain calls."""

    def __init__(self, *inputs: str) -> None:
        self.inputs = [ir.Value(name=name) for name in inputs]
        self.nodes: list[ir.Node] = []

    def op(
        self, op_type: str, *given: ir.Value | Sequence[int], output: str = "", attributes: Sequence[ir.Attr] = ()
    ) -> ir.Value:
        values = [value if isinstance(value, ir.Value) else self._number(*value) for value in given]
        made = ir.Value(name=output or f"v{len(self.nodes)}")
        self.nodes.append(ir.Node("", op_type, values, attributes, outputs=[made]))
        return made

    def _number(self, *values: int) -> ir.Value:
        tensor = ir.AttrTensor("value", ir.Tensor(np.array(values, np.int64)))
        return self.op("Constant", attributes=[tensor])

    def function(self, name: str, outputs: Sequence[ir.Value], attributes: Sequence[ir.Attr] = ()) -> ir.Function:
        graph = ir.Graph(self.inputs, outputs, nodes=self.nodes, opset_imports={"": OPSET}, name=name)
        return ir.Function(CONTRIB, name, "", graph=graph, attributes=attributes)


def convolution(kernel: int, *, bias: bool) -> ir.Function:
    """Depthwise causal convolution of `kernel` taps that goes on from a state: x [B, H, S], taps [H, 1, 1 + kernel] of
    which the first is 0, bias [H], past [B, H, kernel] → y [B, H, S], present [B, H, kernel].

    The operator's state has one entry less than its taps. With a zero before them it is the hub's, which has as many.
    """
    body = _Body("x", "taps", "bias", "past")
    x, taps, offset, past = body.inputs
    axis = ir.AttrInt64("axis", 2)
    full = body.op("Concat", past, x, attributes=[axis])
    total: ir.Value | None = None
    for k in range(1, kernel + 1):
        read = body.op("Slice", full, [k], [k - kernel if k < kernel else _END], [2])
        tap = body.op("Squeeze", body.op("Slice", taps, [k], [k + 1], [2]), [1])
        term = body.op("Mul", read, tap)
        total = term if total is None else body.op("Add", total, term)
    assert total is not None  # kernel >= 1
    if bias:
        total = body.op("Add", total, body.op("Unsqueeze", offset, [1]))
    y = body.op("Identity", total, output="y")
    present = body.op("Slice", full, [-kernel], [_END], [2], output="present")
    return body.function(CONVOLUTION, [y, present])


def head_norm(width: int) -> ir.Function:
    """RMSNorm of every head by itself, summed in fp32: x [B, S, heads · width], scale [width] → y, of the shape of x.

    Releases without the operator make one SimplifiedLayerNormalization of it. Written as that, it ends the process of
    those before 1.31 when they load the graph.
    """
    body = _Body("x", "scale")
    x, scale = body.inputs
    heads = body.op("Cast", body.op("Reshape", x, [0, 0, -1, width]), attributes=[ir.AttrInt64("to", _FLOAT)])
    two = body.op("Constant", attributes=[ir.AttrFloat32("value_float", 2)])
    epsilon = body.op("Constant", attributes=[ir.RefAttr("value_float", "epsilon", ir.AttributeType.FLOAT)])
    mean = body.op("ReduceMean", body.op("Pow", heads, two), [-1], attributes=[ir.AttrInt64("keepdims", 1)])
    unit = body.op("Div", heads, body.op("Sqrt", body.op("Add", mean, epsilon)))
    scaled = body.op("Mul", body.op("CastLike", unit, x), scale)
    y = body.op("Reshape", scaled, [0, 0, -1], output="y")
    used = [ir.Attr("num_branches", ir.AttributeType.INT, 0), ir.Attr("epsilon", ir.AttributeType.FLOAT, 1e-5)]
    return body.function(HEAD_NORM, [y], used)
