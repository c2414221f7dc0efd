"""An encoder in standard operators, without branches: what TensorRT and engines with fixed graphs take."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lfm_quantize.graph import QuantizeError
from lfm_quantize.passes.nodes import constant_of, drop_unused, exchange, node


class WithoutBranches(ir.passes.InPlacePass):
    """Each If → the nodes of its `then` branch: attention as for unpadded views, which is how the runtime runs them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Move the branches' nodes out in place."""
        choices = [n for n in model.graph if n.op_type == "If"]
        for choice in choices:
            branch = choice.attributes["then_branch"].as_graph()
            result, inner = branch.outputs[0], list(branch)
            branch.outputs.clear()
            branch.remove(inner)
            result.name = choice.outputs[0].name
            exchange(model.graph, choice, inner)
        if choices:
            drop_unused(model.graph)
        return ir.passes.PassResult(model, bool(choices))


class StandardOperators(ir.passes.InPlacePass):
    """The encoder without operators of onnxruntime's own and without branches, for unpadded views of one size: what
    TensorRT can take as a whole but for the gathering of tokens. Attention is softmax(q kᵀ / sqrt(d)) v; what
    `FusedBiases` put together is taken apart again.

    Raises:
        QuantizeError: attention is not as export builds it, is kept fp32, or is in standard operators already.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange the nodes in place."""
        graph = model.graph
        attention = [n for n in graph if n.op_type == "If"]
        if not attention:
            raise QuantizeError(
                f"{graph.name} has no onnxruntime attention operators: it already has only standard operators; "
                "use the variant fp16"
            )
        for n in list(graph):
            if n.op_type == "If":
                exchange(graph, n, _attention(graph, n))
            elif n.op_type == "FastGelu":
                exchange(graph, n, _gelu(n))
            elif n.op_type == "SkipLayerNormalization":
                exchange(graph, n, _norm(n))
        drop_unused(graph)
        return ir.passes.PassResult(model, modified=True)


def _gelu(n: ir.Node) -> list[ir.Node]:
    biased = node("Add", n.inputs, f"{n.name}.biased")
    return [biased, node("Gelu", [biased.outputs[0]], str(n.outputs[0].name), str(n.name), approximate="tanh")]


def _norm(n: ir.Node) -> list[ir.Node]:
    product, skip, scale, offset, bias = n.inputs
    biased = node("Add", [product, bias], f"{n.name}.biased")
    total = node("Add", [biased.outputs[0], skip], str(n.outputs[3].name), f"{n.name}.total")
    epsilon = n.attributes["epsilon"].as_float()
    given = [total.outputs[0], scale, offset]
    normed = node("LayerNormalization", given, str(n.outputs[0].name), str(n.name), axis=-1, epsilon=epsilon)
    return [biased, total, normed]


def _attention(graph: ir.Graph, choice: ir.Node) -> list[ir.Node]:
    """Query, key and value [views, patches, heads · d] → [views, patches, heads · d]."""
    name = str(choice.name)
    inner = list(choice.attributes["then_branch"].as_graph())
    if [n.op_type for n in inner] != ["MultiHeadAttention"]:
        raise QuantizeError(
            f"{graph.name}: {name} is not attention as lfm-edge export builds it; export the bundle again"
        )
    weight = graph.initializers.get(f"{name.removesuffix('.attention')}.qkv.weight")
    if weight is None or weight.const_value is None:
        raise QuantizeError(
            f"{graph.name}: {name} stays fp32, because its values overflow fp16 or --keep names it, but TensorRT "
            "needs a graph of one type; use the variant fp16"
        )
    heads, width = inner[0].attributes["num_heads"].as_int(), int(weight.const_value.shape.numpy()[1]) // 3
    kind = weight.const_value.dtype.numpy()
    split = constant_of(graph, "attention.heads", np.array([0, 0, heads, width // heads], np.int64))
    joined = constant_of(graph, "attention.joined", np.array([0, 0, width], np.int64))
    scale = constant_of(graph, "attention.scale", np.array((width // heads) ** -0.5, kind))
    nodes: list[ir.Node] = []

    def add(op_type: str, given: list[ir.Value | None], short: str, output: str = "", **attributes: Any) -> ir.Value:
        nodes.append(node(op_type, given, output or f"{name}.{short}", f"{name}.{short}", **attributes))
        return nodes[-1].outputs[0]

    parts = []
    for value, order, short in zip(
        inner[0].inputs[:3], ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), ("q", "k", "v"), strict=True
    ):
        parts.append(add("Transpose", [add("Reshape", [value, split], f"{short}.split")], short, perm=order))
    # Scaled before the product, whose fp16 sums could overflow.
    scores = add("MatMul", [add("Mul", [parts[0], scale], "scaled"), parts[1]], "scores")
    mixed = add("MatMul", [add("Softmax", [scores], "shares", axis=-1), parts[2]], "mixed")
    together = add("Transpose", [mixed], "together", perm=[0, 2, 1, 3])
    add("Reshape", [together, joined], "joined", str(choice.outputs[0].name))
    return nodes
