"""Constants exchanged for others of the same shape."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from lfm_quantize.graph import Array
from lfm_quantize.passes.nodes import constant_of


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
