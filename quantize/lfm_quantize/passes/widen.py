"""An fp16 graph of ours as the fp32 one it was made of."""

from __future__ import annotations

import onnx_ir as ir

from lfm_quantize.graph import FLOAT, FLOAT16, retyped


class Widen(ir.passes.InPlacePass):
    """Constants, edges and casts in fp16 become fp32. An fp16 graph of ours is the fp32 one with other types and some
    casts, which cast to the type they find then. A graph without fp16 is left as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the types in place; weights stay stored as they are and are converted when they are used."""
        modified = False
        for value in model.graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype == FLOAT16:
                value.const_value, modified = retyped(value.const_value, FLOAT), True
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.dtype == FLOAT16:
                value.type, modified = ir.TensorType(FLOAT), True
        for n in ir.traversal.RecursiveGraphIterator(model.graph):
            if n.op_type == "Cast" and n.attributes["to"].as_int() == FLOAT16:
                n.attributes["to"], modified = ir.AttrInt64("to", FLOAT), True
        return ir.passes.PassResult(model, modified)
