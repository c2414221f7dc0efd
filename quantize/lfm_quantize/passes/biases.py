"""Biases of an encoder added where a norm or an activation reads the values anyway, for GPUs."""

from __future__ import annotations

import onnx_ir as ir

from lfm_quantize.graph import CONTRIB, FLOAT16
from lfm_quantize.passes.nodes import drop_unused, exchange, node, producer


class FusedBiases(ir.passes.InPlacePass):
    """Gemm, Add, LayerNormalization → MatMul, SkipLayerNormalization; Gemm, Gelu (tanh) → MatMul, FastGelu. CUDA's Gemm
    writes its bias to every row of its output first, and reads it there; the CPU's does not. Products whose bias or
    norm is kept fp32 are left as they are, and so are those whose output has another reader.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange the nodes in place."""
        modified = False
        for n in list(model.graph):
            if n.op_type == "LayerNormalization":
                modified |= _into_norm(model.graph, n)
            elif n.op_type == "Gelu" and "approximate" in n.attributes:
                modified |= n.attributes["approximate"].as_string() == "tanh" and _into_gelu(model.graph, n)
        if modified:
            drop_unused(model.graph)
        return ir.passes.PassResult(model, modified)


def _product(value: ir.Value | None) -> ir.Node | None:
    """The fp16 Gemm with a bias that makes this value for one reader alone."""
    n = producer(value)
    if value is None or n is None or n.op_type != "Gemm" or len(n.inputs) != 3 or len(value.uses()) != 1:
        return None
    bias = n.inputs[2]
    return n if _is_half(bias) else None


def _is_half(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.dtype == FLOAT16


def _without_bias(graph: ir.Graph, gemm: ir.Node) -> ir.Value:
    """Exchange a product for one without the bias; returns what it gives."""
    product = node("MatMul", gemm.inputs[:2], f"{gemm.name}.product", str(gemm.name))
    graph.insert_after(gemm, [product])
    return product.outputs[0]


def _into_norm(graph: ir.Graph, norm: ir.Node) -> bool:
    total = producer(norm.inputs[0])
    if total is None or total.op_type != "Add" or not _is_half(norm.inputs[1]):
        return False
    gemm = next(filter(None, map(_product, total.inputs)), None)
    if gemm is None:
        return False
    skip = next(value for value in total.inputs if value is not gemm.outputs[0])
    # The total keeps its name, by which layers are compared.
    made = [str(norm.outputs[0].name), "", "", str(total.outputs[0].name)]
    given = [_without_bias(graph, gemm), skip, *norm.inputs[1:], gemm.inputs[2]]
    epsilon = norm.attributes["epsilon"].as_float()
    fused = node("SkipLayerNormalization", given, made, str(norm.name), domain=CONTRIB, epsilon=epsilon)
    sum_before, sum_after = total.outputs[0], fused.outputs[3]
    exchange(graph, norm, [fused])
    ir.convenience.replace_all_uses_with(sum_before, sum_after, replace_graph_outputs=True)
    return True


def _into_gelu(graph: ir.Graph, gelu: ir.Node) -> bool:
    gemm = _product(gelu.inputs[0])
    if gemm is None:
        return False
    given = [_without_bias(graph, gemm), gemm.inputs[2]]
    exchange(graph, gelu, [node("FastGelu", given, str(gelu.outputs[0].name), str(gelu.name), domain=CONTRIB)])
    return True
