"""The token look-up in a quantized table."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lfm_quantize.graph import CONTRIB, FLOAT, lazily
from lfm_quantize.passes.integers import TABLE, pack, scales_of
from lfm_quantize.passes.nodes import constant_of, drop_unused, exchange, node
from lfm_quantize.rounding import Rounded


class QuantizedTable(ir.passes.InPlacePass):
    """The first Gather of an embedding graph → a look-up in integers. Stored bytes are those of the tied head's form
    of the table (see `Integers`).
    """

    def __init__(self, rounded: Rounded) -> None:
        self.rounded = rounded

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange the look-up in place."""
        gather = look_up(model)
        make = _eight_bits if self.rounded.precision.bits == 8 else _four_bits
        exchange(model.graph, gather, make(model.graph, gather, self.rounded))
        drop_unused(model.graph)
        return ir.passes.PassResult(model, modified=True)


def look_up(embed: ir.Model) -> ir.Node:
    """The node that takes rows out of the embedding table."""
    return next(n for n in embed.graph if n.op_type == "Gather")


def _eight_bits(graph: ir.Graph, gather: ir.Node, rounded: Rounded) -> list[ir.Node]:
    ids, y, name = gather.inputs[1], str(gather.outputs[0].name), str(gather.name)
    stored = lazily(lambda: rounded.codes, ir.DataType.INT8, rounded.codes.shape)
    codes = node("Gather", [constant_of(graph, f"{TABLE}.weight_int8", stored), ids], f"{name}.codes", axis=0)
    values = node("Cast", [codes.outputs[0]], f"{name}.values", to=FLOAT)
    scale = node("Gather", [constant_of(graph, f"{TABLE}.scales", rounded.scales), ids], f"{name}.scale", axis=0)
    return [codes, values, scale, node("Mul", [values.outputs[0], scale.outputs[0]], y, name)]


def _four_bits(graph: ir.Graph, gather: ir.Node, rounded: Rounded) -> list[ir.Node]:
    ids, y, name = gather.inputs[1], str(gather.outputs[0].name), str(gather.name)
    n, k = rounded.codes.shape
    blocks = rounded.scales.shape[1]
    flat, nodes = scales_of(graph, TABLE, rounded.scales)
    shape = constant_of(graph, f"{name}.shape", np.array([n, blocks], np.int64))
    scales = node("Reshape", [flat, shape], f"{name}.scales")
    zeros = np.full((n, blocks), 8, np.uint8) if rounded.zero_points is None else rounded.zero_points
    even = np.append(zeros, np.uint8(8)) if zeros.size % 2 else zeros.reshape(-1)
    codes = lazily(lambda: pack(rounded.codes), ir.DataType.UINT4, (n, k))
    inputs = [
        constant_of(graph, f"{TABLE}.weight_q4", codes),
        ids,
        scales.outputs[0],
        constant_of(graph, f"{name}.zero_points", ir.PackedTensor(pack(even), ir.DataType.UINT4, shape=(n, blocks))),
    ]
    axes = {"gather_axis": 0, "quantize_axis": 1, "block_size": rounded.precision.block}
    return [*nodes, scales, node("GatherBlockQuantized", inputs, y, name, domain=CONTRIB, **axes)]
