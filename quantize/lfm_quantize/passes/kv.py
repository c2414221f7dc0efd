"""Keys and values remembered in 8 bits instead of 32, each channel of each head with a scale of its own: a quarter of
the memory a long prompt takes. onnxruntime's attention reads and writes the integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from lfm_runtime.formats.contract import KV_SCALES, present_name
from numpy.typing import NDArray

from lfm_quantize.graph import QuantizeError, constant
from lfm_quantize.passes.nodes import constant_of

FIRST_ONNXRUNTIME = "1.27.0"
"""Whose CPU kernel of GroupQueryAttention takes an int8 past (1.26 fails when it runs)."""
_HEADROOM = 1.1
"""Other prompts go a little beyond the largest value seen; what is beyond the range is cut off."""
_K_SCALE = 12  # GroupQueryAttention's inputs: k_scale, v_scale


class Int8KeysAndValues(ir.passes.InPlacePass):
    """Each GroupQueryAttention gets scales for its keys and values; its pasts and presents become int8. Everything
    else, the weights' files included, stays as it is.

    Args:
        largest: past input of an attention layer → largest magnitude of each channel [kv heads, head dim].

    Raises:
        QuantizeError: the decoder's attention is not GroupQueryAttention.
    """

    def __init__(self, largest: Mapping[str, NDArray[np.float32]]) -> None:
        self.largest = largest

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the attention nodes and the edges in place."""
        graph = model.graph
        attention = [n for n in graph if n.op_type == "GroupQueryAttention"]
        if 2 * len(attention) != len(self.largest):
            raise QuantizeError(f"{graph.name} has attention that is not GroupQueryAttention; export the bundle again")
        scales: dict[str, ir.Value] = {}
        for n in attention:
            pasts = [str(value.name) for value in n.inputs[3:5] if value is not None]
            n.resize_inputs(_K_SCALE + len(pasts))
            for i, past in enumerate(pasts):
                scale = np.maximum(self.largest[past] * np.float32(_HEADROOM / 127), np.float32(1e-8))
                scales[f"{past}.scale"] = constant_of(graph, f"{past}.scale", scale[None, :, None])
                n.replace_input_with(_K_SCALE + i, scales[f"{past}.scale"])
            for name in ("k_quant_type", "v_quant_type"):
                n.attributes[name] = ir.AttrString(name, "PER_CHANNEL")
            n.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        states = {*self.largest, *map(present_name, self.largest)}
        for value in (*graph.inputs, *graph.outputs):
            if value.name in states:
                value.type = ir.TensorType(ir.DataType.INT8)
        digest = hashlib.sha256(b"".join(constant(scales[name]).tobytes() for name in sorted(scales)))
        model.metadata_props[KV_SCALES] = digest.hexdigest()
        return ir.passes.PassResult(model, bool(attention))
