"""What passes are written with: nodes and constants by name, and the exchange of one node for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lfm_quantize.graph import Array, reads


def rewritten(model: ir.Model, *passes: ir.passes.PassBase) -> ir.Model:
    """A copy of a graph, changed by passes one after the other. Its constants are the same tensors. (Not by
    ir.passes.Sequential, which hides a pass's own error in another.)
    """
    copy = model.clone()
    for each in passes:
        copy = each(copy).model
    return copy


def node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    outputs: str | Sequence[str],
    name: str = "",
    domain: str = "",
    **attributes: Any,
) -> ir.Node:
    """A node called `name` (as its output, if nothing is said), whose outputs have these names."""
    outputs = [outputs] if isinstance(outputs, str) else outputs
    values = [ir.Value(name=output) for output in outputs]
    return ir.node(op_type, inputs, attributes or None, domain=domain, outputs=values, name=name or outputs[0])


def constant_of(graph: ir.Graph, name: str, data: Array | ir.TensorProtocol) -> ir.Value:
    """The constant of this name, made or changed to hold `data`."""
    tensor = ir.Tensor(np.asarray(data, order="C"), name=name) if isinstance(data, np.ndarray | np.generic) else data
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=tensor))
    graph.initializers[name].const_value = tensor
    return graph.initializers[name]


def exchange(graph: ir.Graph, old: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put `new` in the place of `old`: readers of a value of `old` read the one of that name which `new` makes."""
    made = {value.name: value for n in new for value in n.outputs if value.name}
    pairs = [(value, made[value.name]) for value in old.outputs if value.name in made]
    ir.convenience.replace_nodes_and_values(
        graph, old, [old], list(new), [before for before, _ in pairs], [after for _, after in pairs]
    )
    _let_go(old)


def drop_unused(graph: ir.Graph) -> None:
    """Remove nodes and constants that no output needs."""
    needed = set(graph.outputs)
    for n in reversed(graph):
        if needed.isdisjoint(n.outputs):
            graph.remove(n, safe=True)
            _let_go(n)
        else:
            needed.update(reads(n))
    for name, value in list(graph.initializers.items()):
        if value not in needed:
            del graph.initializers[name]


def _let_go(removed: ir.Node) -> None:
    """The branches of a node that was removed read no value of the graph any more."""
    for attribute in removed.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for n in attribute.as_graph():
                for i in range(len(n.inputs)):
                    n.replace_input_with(i, None)
                _let_go(n)


def producer(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value; None for inputs and constants."""
    return value.producer() if value is not None else None
