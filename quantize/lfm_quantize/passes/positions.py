"""A decoder with logits for every position."""

from __future__ import annotations

import onnx_ir as ir

from lfm_quantize.graph import QuantizeError
from lfm_quantize.passes.nodes import drop_unused


class AllPositions(ir.passes.InPlacePass):
    """The two Slices that take the last positions out before the last feed-forward layer are skipped: of what the last
    layer mixed, and of the residual.

    Raises:
        QuantizeError: the graph has other slices than those.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Connect the readers of the slices with what is sliced, in place."""
        slices = [n for n in model.graph if n.op_type == "Slice" and str(n.name).startswith("text.read.")]
        if len(slices) != 2:
            raise QuantizeError(f"{model.graph.name} was made by an older lfm-edge; export the bundle again")
        for n in slices:
            sliced = n.inputs[0]
            assert sliced is not None
            ir.convenience.replace_all_uses_with(n.outputs[0], sliced)
        drop_unused(model.graph)
        return ir.passes.PassResult(model, modified=True)
