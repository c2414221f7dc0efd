"""A decoder that need not send its logits to the host: it also gives out its likeliest tokens and the mask of its next
step, so that all the rest stays on the device.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from lfm_runtime.formats.contract import BATCH, NEXT_MASK, POSITIONS, TOP_IDS, TOP_LOGITS, TOP_TOKENS, TOTAL

from lfm_quantize.graph import FLOAT
from lfm_quantize.passes.nodes import constant_of, exchange, node

_INT64 = ir.DataType.INT64


class Likeliest(ir.passes.InPlacePass):
    """Adds the outputs TOP_LOGITS, TOP_IDS and NEXT_MASK. The mask is summed in fp32, where CUDA needs no cuDNN for it;
    ones add up exactly to 2²⁴. A decoder that does not sum its mask keeps the rest of its nodes as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Append the nodes and outputs in place."""
        graph = model.graph
        mask = next(value for value in graph.inputs if value.name == "attention_mask")
        logits = next(value for value in graph.outputs if value.name == "logits")
        assert logits.shape is not None
        vocabulary = logits.shape[2]
        assert isinstance(vocabulary, int)
        count = min(TOP_TOKENS, vocabulary)
        _sum_in_fp32(graph, mask)
        counted, first, axis, last = (
            constant_of(graph, f"gpu.{name}", np.array([value], np.int64))
            for name, value in (("count", count), ("first", 0), ("axis", 1), ("last", -1))
        )
        likeliest = node("TopK", [logits, counted], [TOP_LOGITS, TOP_IDS], "gpu.likeliest")
        # Padding is on the right and the first token always there: the mask with one token more is itself, moved by
        # one.
        there = node("Slice", [mask, first, axis, axis], "gpu.there")
        before = node("Slice", [mask, first, last, axis], "gpu.before")
        joined = node("Concat", [there.outputs[0], before.outputs[0]], NEXT_MASK, "gpu.next_mask", axis=1)
        graph.extend([likeliest, there, before, joined])
        edges = zip((*likeliest.outputs, joined.outputs[0]), (FLOAT, _INT64, _INT64), strict=True)
        for value, dtype in edges:
            value.type = ir.TensorType(dtype)
            value.shape = ir.Shape([BATCH, TOTAL] if value.name == NEXT_MASK else [BATCH, POSITIONS, count])
            graph.outputs.append(value)
        return ir.passes.PassResult(model, modified=True)


def _sum_in_fp32(graph: ir.Graph, mask: ir.Value) -> None:
    """A sum of the mask with a Cast before it and one after; export --dtype fp16 writes it so from the start."""
    summed = next((n for n in graph if n.op_type == "ReduceSum" and n.inputs[0] is mask), None)
    if summed is None:
        return
    cast = node("Cast", [mask], "gpu.mask", to=FLOAT)
    counted = ir.node(
        "ReduceSum",
        [cast.outputs[0], *summed.inputs[1:]],
        {name: attribute.value for name, attribute in summed.attributes.items()},
        outputs=[ir.Value(name="gpu.sum")],
        name=summed.name,
    )
    back = node("Cast", [counted.outputs[0]], str(summed.outputs[0].name), "gpu.sum", to=_INT64)
    exchange(graph, summed, [cast, counted, back])
