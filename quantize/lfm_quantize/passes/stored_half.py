"""A float constant that is no product's weight, as fp16 in the file."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lfm_quantize.graph import FLOAT, constant
from lfm_quantize.passes.nodes import constant_of, drop_unused, node


class StoredAsHalf(ir.passes.InPlacePass):
    """A constant with one reader → its fp16 form and a Cast, which onnxruntime folds when it loads the graph."""

    def __init__(self, name: str) -> None:
        self.name = name

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put the Cast before the reader, in place."""
        graph = model.graph
        value = graph.initializers[self.name]
        ((reader, index),) = value.uses()
        cast = node(
            "Cast",
            [constant_of(graph, f"{self.name}.fp16", constant(value).astype(np.float16))],
            f"{self.name}.fp32",
            to=FLOAT,
        )
        graph.insert_before(reader, [cast])
        reader.replace_input_with(index, cast.outputs[0])
        drop_unused(graph)
        return ir.passes.PassResult(model, modified=True)
