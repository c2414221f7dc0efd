"""Constants exchanged for others of the same shape, or for fp16."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lfm_quantize.graph import FLOAT, Array, constant
from lfm_quantize.passes.nodes import constant_of, drop_unused, node


class Constants(ir.passes.InPlacePass):
    """The named constants hold these arrays. Names that the graph does not have are left alone: a part has few of
    them.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = arrays

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange in place."""
        found = [name for name in self.arrays if name in model.graph.initializers]
        for name in found:
            constant_of(model.graph, name, self.arrays[name])
        return ir.passes.PassResult(model, bool(found))


class StoredAsHalf(ir.passes.InPlacePass):
    """A float constant that is no product's weight and has one reader → its fp16 form and a Cast, which onnxruntime
    folds when it loads the graph.
    """

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
