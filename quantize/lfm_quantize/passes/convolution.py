"""A decoder's short convolutions in one kernel each, for GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from lfm_runtime.formats.contract import CONV_WINDOW

from lfm_quantize.graph import CONTRIB, FLOAT16, Array, constant, reads
from lfm_quantize.passes.nodes import constant_of, drop_unused, node, producer

_CONV = "CausalConvWithState"
_END = np.iinfo(np.int64).max


class FusedConvolutions(ir.passes.InPlacePass):
    """Each short convolution as one CausalConvWithState, which CUDA has since onnxruntime 1.25: 6 kernels for 15. The
    graph brings along what that operator is, as a function of standard operators, which older releases compute instead.

    A zero before the taps makes the operator's state, one entry less than its kernel, the hub's, which is as long as
    the kernel. What a convolution has read is no output any more. Those that are kept fp32 are left as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange the convolutions in place, and take the windows off the outputs."""
        graph, modified = model.graph, False
        for window in [value for value in graph.outputs if str(value.name).startswith(CONV_WINDOW)]:
            taps = _fuse(graph, window)
            if taps is not None:
                function = _convolution(taps.shape[1], bias=f"{_place(window)}.bias" in graph.initializers)
                model.functions[function.identifier()] = function
                modified = True
            graph.outputs.remove(window)
            window.type = window.shape = None
        drop_unused(graph)
        return ir.passes.PassResult(model, modified)


def _place(window: ir.Value) -> str:
    return f"text.layers.{str(window.name).removeprefix(CONV_WINDOW)}.conv.conv"


def _fuse(graph: ir.Graph, window: ir.Value) -> Array | None:
    """Exchange the convolution that reads this window; returns its taps [H, kernel], or None where something of it is
    kept fp32, and casts lie between.
    """
    layer, place = str(window.name).removeprefix(CONV_WINDOW), _place(window)
    taps, bias = graph.initializers.get(f"{place}.weight"), graph.initializers.get(f"{place}.bias")
    joined = window.producer()
    product = producer(joined.inputs[-1]) if joined else None
    split = producer(product.inputs[0]) if product else None
    if taps is None or taps.const_value is None or taps.const_value.dtype != FLOAT16 or joined is None or split is None:
        return None
    if (joined.op_type, split.op_type) != ("Concat", "Split"):
        return None
    gate = split.outputs[1]
    gated = next(n for n in graph if gate in reads(n))
    if gated.op_type != "Mul":
        return None
    past = next(value for value in graph.inputs if value.name == f"past_conv.{layer}")
    present = next(value for value in graph.outputs if value.name == f"present_conv.{layer}")
    convolved = next(value for value in gated.inputs if value is not None and value is not gate)
    stored: Array = constant(taps).T
    padded = constant_of(graph, f"{place}.taps", np.pad(stored[:, None], ((0, 0), (0, 0), (1, 0))))
    channels = node("Transpose", [joined.inputs[1]], f"{place}.channels", perm=[0, 2, 1])
    conv = node(
        _CONV,
        [channels.outputs[0], padded, bias, past],
        [f"{place}.convolved", str(present.name)],
        place,
        domain=CONTRIB,
    )
    tokens = node("Transpose", [conv.outputs[0]], str(convolved.name), f"{place}.tokens", perm=[0, 2, 1])
    graph.insert_after(joined, [channels, conv, tokens])
    for old, new in ((convolved, tokens.outputs[0]), (present, conv.outputs[1])):
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove([n for n in (old.producer(),) if n], safe=True)
    return stored


def _convolution(kernel: int, *, bias: bool) -> ir.Function:
    """CausalConvWithState as all layers use it, in standard operators: x [B, H, S], taps [H, 1, 1 + kernel] of which
    the first is 0, bias [H], past [B, H, kernel] → y [B, H, S], present [B, H, kernel].
    """
    x, taps, offset, past = inputs = [ir.Value(name=name) for name in ("x", "taps", "bias", "past")]
    nodes = [node("Concat", [past, x], "full", axis=2)]
    full = nodes[0].outputs[0]

    def add(op_type: str, *given: ir.Value | Sequence[int]) -> ir.Value:
        values = [value if isinstance(value, ir.Value) else number(*value) for value in given]
        nodes.append(node(op_type, values, f"v{len(nodes)}"))
        return nodes[-1].outputs[0]

    def number(*values: int) -> ir.Value:
        nodes.append(node("Constant", [], f"c{len(nodes)}", value=ir.Tensor(np.array(values, np.int64))))
        return nodes[-1].outputs[0]

    total: ir.Value | None = None
    for k in range(1, kernel + 1):
        read = add("Slice", full, [k], [k - kernel if k < kernel else _END], [2])
        tap = add("Squeeze", add("Slice", taps, [k], [k + 1], [2]), [1])
        term = add("Mul", read, tap)
        total = term if total is None else add("Add", total, term)
    assert total is not None
    if bias:
        total = add("Add", total, add("Unsqueeze", offset, [1]))
    y = node("Identity", [total], "y")
    nodes.append(y)
    present = add("Slice", full, [-kernel], [_END], [2])
    present.name = "present"
    graph = ir.Graph(inputs, [y.outputs[0], present], nodes=nodes, opset_imports={"": 20}, name=_CONV)
    return ir.Function(CONTRIB, _CONV, "", graph=graph, attributes=[])
