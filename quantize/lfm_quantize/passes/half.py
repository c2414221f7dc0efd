"""An fp32 graph as an fp16 one, for GPUs: weights, states and hidden values in fp16; logits, features and embeddings
out in fp32.

Position arithmetic (interpolation weights, rotary angles) starts from integers and stays fp32 until it meets hidden
values. Of a graph with 4-bit weights, all the rest becomes fp16.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir
from lfm_runtime.formats.contract import CONV_INPUT

from lfm_quantize.graph import FLOAT, FLOAT16, reads, retyped
from lfm_quantize.passes.nodes import drop_unused, node


class Half(ir.passes.InPlacePass):
    """The graph in fp16. Nodes named in `stay` stay fp32 as a whole, with casts around them."""

    def __init__(self, stay: Collection[str] = ()) -> None:
        self.stay = frozenset(stay)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change types in place, node by node in the graph's order."""
        _Conversion(model.graph, self.stay).run()
        return ir.passes.PassResult(model, modified=True)


class _Conversion:
    """One graph on its way to fp16: which type each value has so far."""

    def __init__(self, graph: ir.Graph, stay: frozenset[str]) -> None:
        self.graph = graph
        self.stay = stay
        self.constants = {v for v in graph.initializers.values() if _type_of(v) == FLOAT}
        # fp32 constant → its form in each type. A constant may have readers of both.
        self.typed: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.used: dict[ir.Value, None] = {}  # constants in the order of their first reader
        self.kinds: dict[ir.Value, ir.DataType] = {}  # of values; integers are not in it
        self.starts: set[ir.Value] = set()  # where hidden values enter the graph in fp32
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        # Value → the fp16 constant that it is, widened: scales of 4-bit weights.
        self.stored: dict[ir.Value, ir.Value] = {
            n.outputs[0]: source
            for n in graph
            if n.op_type == "Cast" and (source := n.inputs[0]) is not None and _type_of(source) == FLOAT16
        }

    def run(self) -> None:
        """Inputs, nodes, outputs; then constants, in the order in which they are used, without those that are not."""
        for value in self.graph.inputs:
            if value.dtype == FLOAT:
                state = str(value.name).startswith("past_")
                self.kinds[value] = FLOAT16 if state else FLOAT
                value.type = ir.TensorType(self.kinds[value])
                if not state:
                    self.starts.add(value)
        for n in list(self.graph):
            self._convert(n)
        for value in list(self.graph.outputs):
            self._finish(value)
        drop_unused(self.graph)
        self.graph.initializers.clear()
        for value in self.used:
            if value.uses():
                self.graph.register_initializer(value)

    def _convert(self, n: ir.Node) -> None:
        read = reads(n)
        floats = [value for value in read if value in self.kinds]
        hidden = any(self.kinds[value] == FLOAT16 or value in self.starts for value in floats)
        # A Gather reads token embeddings.
        hidden = hidden or (n.op_type == "Gather" and n.inputs[0] in self.constants)
        kind = FLOAT16 if hidden and n.name not in self.stay else FLOAT
        measures = n.op_type == "Shape"  # takes any type
        to = ir.DataType(n.attributes["to"].as_int()) if n.op_type == "Cast" else None
        entered = n.inputs[0] if n.inputs else None
        if not measures:
            for reader in (n, *_inside(n)):  # what branches take from outside is read as well
                for i, value in enumerate(reader.inputs):
                    if value is not None and (value in self.kinds or value in self.constants):
                        reader.replace_input_with(i, self._as(value, kind, n))
        others = {v for v in read if _type_of(v) is not None} - self.constants
        self.used |= dict.fromkeys(sorted(others, key=lambda v: str(v.name)))
        if to == FLOAT and entered in self.starts:  # of a graph made of an fp16 one: where hidden values entered it
            n.replace_input_with(0, entered)
            n.attributes["to"] = ir.AttrInt64("to", FLOAT16)
            self.kinds[n.outputs[0]] = FLOAT16
        elif not measures and (to == FLOAT or (to is None and (floats or self.constants.intersection(read)))):
            self.kinds |= dict.fromkeys(n.outputs, FLOAT if to == FLOAT else kind)

    def _as(self, value: ir.Value, kind: ir.DataType, reader: ir.Node) -> ir.Value:
        """A constant or value in the type wanted; a Cast that this needs stands before its first reader."""
        if value in self.constants:
            return self._constant(value, kind)
        if kind == FLOAT16 and value in self.stored:
            self.used.setdefault(self.stored[value])
            return self.stored[value]
        if self.kinds.get(value, kind) == kind:
            return value
        if (value, kind) not in self.casts:
            cast = node("Cast", [value], f"{value.name}.{'fp16' if kind == FLOAT16 else 'fp32'}", to=kind)
            self.graph.insert_before(reader, [cast])
            self.casts[value, kind] = cast.outputs[0]
        return self.casts[value, kind]

    def _constant(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """A constant in fp16 keeps its name; one that stays fp32 is called so."""
        if (value, kind) not in self.typed:
            assert value.const_value is not None
            name = str(value.name) if kind == FLOAT16 else f"{value.name}.fp32"
            self.typed[value, kind] = ir.Value(name=name, const_value=retyped(value.const_value, kind))
        made = self.typed[value, kind]
        self.used.setdefault(made)
        return made

    def _finish(self, value: ir.Value) -> None:
        """An output in the type of its kind: states in fp16, all other floats in fp32."""
        if value not in self.kinds:
            return  # integers
        wanted = FLOAT16 if str(value.name).startswith(("present", CONV_INPUT)) else FLOAT
        if self.kinds[value] != wanted:
            name, shape = str(value.name), value.shape
            value.name, value.type, value.shape = f"{name}.inner", None, None
            cast = node("Cast", [value], name, f"{name}.cast", to=wanted)
            self.graph.append(cast)
            self.graph.outputs[self.graph.outputs.index(value)] = cast.outputs[0]
            value = cast.outputs[0]
            value.shape = shape
        value.type = ir.TensorType(wanted)


def _inside(n: ir.Node) -> Iterator[ir.Node]:
    """The nodes of a node's branches."""
    for attribute in n.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph()


def _type_of(value: ir.Value) -> ir.DataType | None:
    """Of a constant; None for what is none."""
    return value.const_value.dtype if value.const_value is not None else None
