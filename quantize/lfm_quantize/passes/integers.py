"""A matrix product in its quantized form.

8 bits: every row of the input, a token or a patch, is quantized by QuantizeLinear with a range of its own, whatever
else is in the tensor, then multiplied back. (onnxruntime dynamic quantization has one range for the whole tensor.)
4 bits: MatMulNBits, which quantizes inputs block by block of a row. All exist on every onnxruntime from 1.20.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lfm_quantize.graph import CONTRIB, FLOAT, Array, Linear, lazily, linears
from lfm_quantize.passes.nodes import constant_of, drop_unused, exchange, node, producer
from lfm_quantize.rounding import Rounded, fits_half

TABLE = "table"
"""Name of the embedding table's constants, in the embedding graph and in the head tied to it: their bytes are stored
once.
"""
ACCURACY_LEVEL = 4  # of MatMulNBits: int8 inputs
_NORMS = ("SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization")
_TINY = np.array(1e-20, np.float32)  # a row of zeros is divided by this


@dataclass(frozen=True)
class Product:
    """How a matrix product is computed in integers.

    `negative`, for 8 bits, is the share of the inputs' range that lies below zero, against that above: 1 for inputs of
    both signs, 1/8 after Gelu, whose least output is -0.17. The 255 steps are spent where the inputs are.
    """

    rounded: Rounded
    negative: float = 1.0


class Integers(ir.passes.InPlacePass):
    """MatMul or Gemm with a constant → the operators of its precision, for the products named. A bias that the
    product's own node adds is added by an Add. Products not named are left alone; so are names of other graphs.

    Args:
        products: by node name.
        tied: the product called `head` multiplies with the embedding table: its constants are called TABLE.
    """

    def __init__(self, products: Mapping[str, Product], *, tied: bool = False) -> None:
        self.products = products
        self.tied = tied

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange the products in place, in the graph's order."""
        graph = model.graph
        found = [linear for name, linear in linears(model).items() if name in self.products]
        for linear in found:
            rows = linear.node.inputs[0]
            exchange(graph, linear.node, self._nodes(graph, linear, self.products[linear.name]))
            if linear.node.op_type == "Gemm":
                _in_three_axes(graph, rows)
        if found:
            drop_unused(graph)
        return ir.passes.PassResult(model, bool(found))

    def _nodes(self, graph: ir.Graph, linear: Linear, product: Product) -> list[ir.Node]:
        tied = self.tied and linear.name == "head"
        x, y, name = linear.node.inputs[0], str(linear.node.outputs[0].name), TABLE if tied else linear.name
        assert x is not None
        output = f"{name}.product" if linear.adds_bias else y
        if product.rounded.precision.bits == 4:
            nodes = _four_bits(graph, name, x, output, product.rounded)
        else:
            flat = linear.node.op_type == "Gemm" and linear.name != "head"  # the head's Reshapes go
            nodes = _eight_bits(graph, name, x, output, product, flat=flat, tied=tied)
        if linear.adds_bias:
            nodes.append(node("Add", [nodes[-1].outputs[0], linear.node.inputs[2]], y, f"{name}.bias"))
        return nodes


def _in_three_axes(graph: ir.Graph, rows: ir.Value | None) -> None:
    """A Gemm takes two axes, integer products any number: the Reshapes around a head go. The one that ends in the
    logits copies all of them, 0.5 ms of a 450M's token.
    """
    before = producer(rows)
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    after = producer(logits)
    if before is None or after is None or (before.op_type, after.op_type) != ("Reshape", "Reshape"):
        return  # not as we export it
    normed, made = before.inputs[0], after.inputs[0]
    norm = producer(normed)
    if norm is None or norm.op_type not in _NORMS or normed is None or made is None or rows is None or logits is None:
        return
    ir.convenience.replace_all_uses_with(rows, normed)
    made.type, made.shape = logits.type, logits.shape
    ir.convenience.replace_all_uses_with(logits, made, replace_graph_outputs=True)
    graph.remove([before, after], safe=True)
    made.name = str(logits.name)


def _eight_bits(
    graph: ir.Graph, name: str, x: ir.Value, output: str, product: Product, *, flat: bool, tied: bool
) -> list[ir.Node]:
    """`flat`: x has two axes, which QuantizeLinear wants for a scale a row. `tied`: the weights are stored as the table
    has them.
    """
    rounded = product.rounded
    n, k = rounded.codes.shape
    steps = 255 / (1 + product.negative)  # of the range above zero
    zero = round(steps * product.negative)
    step = constant_of(graph, f"quantize.step_{zero}", np.array(1 / steps, np.float32))
    zero_point = constant_of(graph, f"quantize.zero_{zero}", np.array(zero, np.uint8))
    one = constant_of(graph, "quantize.one", np.array(1, np.float32))
    scales = constant_of(graph, f"{name}.scales", np.ascontiguousarray(rounded.scales[:, 0]))
    made = []

    def add(op_type: str, given: Sequence[ir.Value], short: str, **attributes: Any) -> ir.Value:
        made.append(node(op_type, given, f"{name}.{short}", **attributes))
        return made[-1].outputs[0]

    if tied:  # onnxruntime makes the transposed copy once, when it loads the graph
        stored = constant_of(graph, f"{name}.weight_int8", lazily(lambda: rounded.codes, ir.DataType.INT8, (n, k)))
        weight = add("Transpose", [stored], "transposed", perm=[1, 0])
    else:
        codes = lazily(lambda: np.ascontiguousarray(rounded.codes.T), ir.DataType.INT8, (k, n))
        weight = constant_of(graph, f"{name}.weight_int8", codes)
    span, ranges = _ranges(graph, name, x, product)
    made += ranges
    column = add("Mul", [span, step], "steps")
    row = add("Reshape", [column, _integers(graph, -1)], "row_steps")
    zeros = add("Expand", [zero_point, add("Shape", [row], "rows")], "zeros")
    rows = x if flat else add("Reshape", [x, _integers(graph, -1, k)], "flat")
    inputs = add("QuantizeLinear", [rows, row, zeros], "inputs", axis=0)
    inputs = inputs if flat else add("Reshape", [inputs, add("Shape", [x], "shape")], "shaped")
    counted = add("MatMulIntegerToFloat", [inputs, weight, one, scales, zero_point], "matmul", domain=CONTRIB)
    return [*made, node("Mul", [counted, column], output, f"{name}.scaled")]


def _integers(graph: ir.Graph, *values: int) -> ir.Value:
    return constant_of(graph, f"quantize.shape{''.join(f'_{v}' for v in values)}", np.array(values, np.int64))


def _last_axis(graph: ir.Graph) -> ir.Value:
    return constant_of(graph, "quantize.last_axis", np.array([-1], np.int64))


def _ranges(graph: ir.Graph, name: str, x: ir.Value, product: Product) -> tuple[ir.Value, list[ir.Node]]:
    """How far each row reaches above zero, or below it where that counts for more, [… , 1]; and the nodes for it."""
    below = 1 / product.negative
    tiny = constant_of(graph, "quantize.tiny", _TINY)
    minus = constant_of(graph, f"quantize.minus_{below:g}", np.array(-below, np.float32))
    largest = node("ReduceMax", [x, _last_axis(graph)], f"{name}.max", keepdims=1)
    least = node("ReduceMin", [x, _last_axis(graph)], f"{name}.min", keepdims=1)
    mirrored = node("Mul", [least.outputs[0], minus], f"{name}.below")
    span = node("Max", [largest.outputs[0], mirrored.outputs[0], tiny], f"{name}.range")
    return span.outputs[0], [largest, least, mirrored, span]


def _four_bits(graph: ir.Graph, name: str, x: ir.Value, output: str, rounded: Rounded) -> list[ir.Node]:
    n, k = rounded.codes.shape
    block, blocks = rounded.precision.block, rounded.scales.shape[1]
    scales, nodes = scales_of(graph, name, rounded.scales)

    def packed() -> Array:
        padded = np.pad(rounded.codes, ((0, 0), (0, blocks * block - k)), constant_values=8)
        return pack(padded).reshape(n, blocks, block // 2)

    weight = constant_of(graph, f"{name}.weight_q4", lazily(packed, ir.DataType.UINT8, (n, blocks, block // 2)))
    inputs = [x, weight, scales]
    if rounded.zero_points is not None:
        even = np.pad(rounded.zero_points, ((0, 0), (0, blocks % 2)), constant_values=8)
        inputs.append(constant_of(graph, f"{name}.zero_points", pack(even).reshape(-1)))
    sizes = {"K": k, "N": n, "bits": 4, "block_size": block, "accuracy_level": ACCURACY_LEVEL}
    return [*nodes, node("MatMulNBits", inputs, output, f"{name}.matmul", domain=CONTRIB, **sizes)]


def scales_of(graph: ir.Graph, name: str, scales: Array) -> tuple[ir.Value, list[ir.Node]]:
    """Scales as fp16 in the file and fp32 in memory: onnxruntime folds the Cast when it loads the graph. Those that
    fp16 does not hold in full precision stay fp32 in the file.
    """
    flat = np.ascontiguousarray(scales.reshape(-1))
    if not fits_half(flat):
        return constant_of(graph, f"{name}.scales", flat), []
    stored = constant_of(graph, f"{name}.scales_fp16", flat.astype(np.float16))
    cast = node("Cast", [stored], f"{name}.scales", to=FLOAT)
    return cast.outputs[0], [cast]


def pack(codes: Any) -> Array:
    """4-bit codes in pairs along the last axis, the first in the low half."""
    return np.ascontiguousarray(codes[..., ::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
