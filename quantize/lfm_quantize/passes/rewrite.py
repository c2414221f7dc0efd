"""One matrix product → its quantized form; one embedding table → its quantized form. Nodes in, nodes out.

8 bits: each row of the input is divided by its own range, so that onnxruntime's dynamic quantization, which takes one
range for the whole tensor, quantizes every token with a range of its own; then multiplied back. 4 bits: MatMulNBits,
which quantizes inputs block by block of a row. Both exist on every onnxruntime from 1.20.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from lfm_quantize.graph import CONTRIB, FLOAT, UINT4, Array, Graph, Linear, Tensor
from lfm_quantize.rounding import Rounded, fits_half

TABLE = "table"
"""Name of the embedding table's constants, in the embedding graph and in the head tied to it: their bytes are stored
once.
"""
ACCURACY_LEVEL = 4  # of MatMulNBits: int8 inputs
_TINY = np.array(1e-20, np.float32)  # a row of zeros is divided by this


def quantized_nodes(
    linear: Linear, rounded: Rounded, *, negative: float = 1.0, tied: bool = False
) -> tuple[list[onnx.NodeProto], dict[str, Tensor]]:
    """Nodes and constants that take the place of a matrix product.

    Args:
        linear: the product.
        rounded: its weights.
        negative: for 8 bits, the share of the inputs' range that lies below zero, against that above: 1 for inputs of
            both signs, 1/8 after Gelu, whose least output is -0.17. The 255 steps are spent where the inputs are.
        tied: the weight is the embedding table, and its constants are TABLE's.
    """
    x, y, name = linear.node.input[0], linear.node.output[0], TABLE if tied else linear.name
    product = f"{name}.product" if linear.adds_bias else y
    if rounded.precision.bits == 4:
        nodes, tensors = _four_bits(name, x, product, rounded)
    else:
        nodes, tensors = _eight_bits(name, x, product, rounded, negative, tied)
    if linear.adds_bias:
        nodes.append(helper.make_node("Add", [product, linear.node.input[2]], [y], f"{name}.bias"))
    return nodes, tensors


def _eight_bits(
    name: str, x: str, y: str, rounded: Rounded, negative: float, tied: bool
) -> tuple[list[onnx.NodeProto], dict[str, Tensor]]:
    weight = f"{name}.transposed" if tied else f"{name}.weight_int8"
    nodes = []
    tensors = {
        f"{name}.scales": Tensor.of(np.ascontiguousarray(rounded.scales[:, 0])),
        "quantize.last_axis": Tensor.of(np.array([-1], np.int64)),
        "quantize.tiny": Tensor.of(_TINY),
        f"quantize.minus_{1 / negative:g}": Tensor.of(np.array(-1 / negative, np.float32)),
    }
    if tied:  # onnxruntime makes the transposed copy once, when it loads the graph
        tensors[f"{name}.weight_int8"] = Tensor.of(rounded.codes)
        nodes.append(helper.make_node("Transpose", [f"{name}.weight_int8"], [weight], weight, perm=[1, 0]))
    else:
        tensors[weight] = Tensor.of(np.ascontiguousarray(rounded.codes.T))
    nodes += [
        helper.make_node("ReduceMax", [x, "quantize.last_axis"], [f"{name}.max"], f"{name}.max", keepdims=1),
        helper.make_node("ReduceMin", [x, "quantize.last_axis"], [f"{name}.min"], f"{name}.min", keepdims=1),
        helper.make_node(
            "Mul", [f"{name}.min", f"quantize.minus_{1 / negative:g}"], [f"{name}.below"], f"{name}.below"
        ),
        helper.make_node("Max", [f"{name}.max", f"{name}.below", "quantize.tiny"], [f"{name}.range"], f"{name}.range"),
        helper.make_node("Div", [x, f"{name}.range"], [f"{name}.unit"], f"{name}.unit"),
        helper.make_node(
            "DynamicQuantizeMatMul",
            [f"{name}.unit", weight, f"{name}.scales"],
            [f"{name}.matmul"],
            f"{name}.matmul",
            domain=CONTRIB,
        ),
        helper.make_node("Mul", [f"{name}.matmul", f"{name}.range"], [y], f"{name}.scaled"),
    ]
    return nodes, tensors


def _four_bits(name: str, x: str, y: str, rounded: Rounded) -> tuple[list[onnx.NodeProto], dict[str, Tensor]]:
    n, k = rounded.codes.shape
    block, blocks = rounded.precision.block, rounded.scales.shape[1]
    packed = pack(np.pad(rounded.codes, ((0, 0), (0, blocks * block - k)), constant_values=8))
    nodes, tensors = _scales(name, rounded.scales)
    tensors[f"{name}.weight_q4"] = Tensor.of(packed.reshape(n, blocks, block // 2))
    inputs = [x, f"{name}.weight_q4", f"{name}.scales"]
    if rounded.zero_points is not None:
        even = np.pad(rounded.zero_points, ((0, 0), (0, blocks % 2)), constant_values=8)
        tensors[f"{name}.zero_points"] = Tensor.of(pack(even).reshape(-1))
        inputs.append(f"{name}.zero_points")
    nodes.append(
        helper.make_node(
            "MatMulNBits",
            inputs,
            [y],
            f"{name}.matmul",
            domain=CONTRIB,
            K=k,
            N=n,
            bits=4,
            block_size=block,
            accuracy_level=ACCURACY_LEVEL,
        )
    )
    return nodes, tensors


def _scales(name: str, scales: Array) -> tuple[list[onnx.NodeProto], dict[str, Tensor]]:
    """Scales as fp16 in the file and fp32 in memory: onnxruntime folds the Cast when it loads the graph."""
    flat = np.ascontiguousarray(scales.reshape(-1))
    if not fits_half(flat):
        return [], {f"{name}.scales": Tensor.of(flat)}
    cast = helper.make_node("Cast", [f"{name}.scales_fp16"], [f"{name}.scales"], f"{name}.scales", to=FLOAT)
    return [cast], {f"{name}.scales_fp16": Tensor.of(flat.astype(np.float16))}


def embedding_nodes(node: onnx.NodeProto, rounded: Rounded) -> tuple[list[onnx.NodeProto], dict[str, Tensor]]:
    """The token look-up in a quantized table: what replaces the Gather. Stored bytes are those of the head's form of
    the table.
    """
    ids, y, name = node.input[1], node.output[0], node.name
    n, k = rounded.codes.shape
    if rounded.precision.bits == 8:
        nodes = [
            helper.make_node("Gather", [f"{TABLE}.weight_int8", ids], [f"{name}.codes"], f"{name}.codes", axis=0),
            helper.make_node("Cast", [f"{name}.codes"], [f"{name}.values"], f"{name}.values", to=FLOAT),
            helper.make_node("Gather", [f"{TABLE}.scales", ids], [f"{name}.scale"], f"{name}.scale", axis=0),
            helper.make_node("Mul", [f"{name}.values", f"{name}.scale"], [y], name),
        ]
        return nodes, {f"{TABLE}.weight_int8": Tensor.of(rounded.codes), f"{TABLE}.scales": Tensor.of(rounded.scales)}
    nodes, tensors = _scales(TABLE, rounded.scales)
    blocks = rounded.scales.shape[1]
    nodes.append(
        helper.make_node("Reshape", [f"{TABLE}.scales", f"{name}.shape"], [f"{name}.scales"], f"{name}.scales")
    )
    zeros = (np.full((n, blocks), 8, np.uint8) if rounded.zero_points is None else rounded.zero_points).reshape(-1)
    tensors |= {
        f"{name}.shape": Tensor.of(np.array([n, blocks], np.int64)),
        f"{TABLE}.weight_q4": Tensor.of(pack(rounded.codes), UINT4, (n, k)),
        f"{name}.zero_points": Tensor.of(pack(np.append(zeros, 8) if zeros.size % 2 else zeros), UINT4, (n, blocks)),
    }
    nodes.append(
        helper.make_node(
            "GatherBlockQuantized",
            [f"{TABLE}.weight_q4", ids, f"{name}.scales", f"{name}.zero_points"],
            [y],
            name,
            domain=CONTRIB,
            gather_axis=0,
            quantize_axis=1,
            block_size=rounded.precision.block,
        )
    )
    return nodes, tensors


def stored_as_half(graph: Graph, name: str) -> tuple[dict[str, list[onnx.NodeProto]], dict[str, Tensor]]:
    """A float constant that is no product's weight, as fp16 in the file: replacements for the node that reads it, and
    the constant.
    """
    (reader,) = [node for node in graph.nodes if name in node.input]
    changed = onnx.NodeProto()
    changed.CopyFrom(reader)
    changed.input[:] = [f"{name}.fp32" if i == name else i for i in reader.input]
    cast = helper.make_node("Cast", [f"{name}.fp16"], [f"{name}.fp32"], f"{name}.fp32", to=FLOAT)
    return {reader.name: [cast, changed]}, {f"{name}.fp16": Tensor.of(graph.tensors[name].array.astype(np.float16))}


def pack(codes: Any) -> Array:
    """4-bit codes in pairs along the last axis, the first in the low half."""
    return np.ascontiguousarray(codes[..., ::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
