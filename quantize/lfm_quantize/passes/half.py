"""An fp32 graph as an fp16 one, for GPUs: weights, states and hidden values in fp16; logits, features and embeddings
out in fp32.

Position arithmetic (interpolation weights, rotary angles) starts from integers and stays fp32 until it meets hidden
values. Nodes whose values leave fp16's range stay fp32 as a whole. Of a graph with 4-bit weights, all the rest becomes
fp16.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

import numpy as np
import onnx
from lfm_runtime.formats.contract import CONV_WINDOW
from onnx import helper

from lfm_quantize.calibrate.blocks import Feeds, Values, blocks_of, run_block
from lfm_quantize.graph import FLOAT, FLOAT16, Graph, Tensor, reads

LARGEST = 60_000.0
"""Magnitude above which a value counts as out of fp16's range (65,504), with a little room for other images."""


def half(graph: Graph, stay: Container[str] = ()) -> Graph:
    """The graph in fp16, nodes named in `stay` in fp32."""
    tensors: dict[str, Tensor] = {}
    nodes: list[onnx.NodeProto] = []
    kinds: dict[str, int] = {}  # value → FLOAT or FLOAT16; integers are not in it
    cast: dict[tuple[str, int], str] = {}
    constants = {name for name, t in graph.tensors.items() if t.dtype == FLOAT}
    stored: dict[str, str] = {  # value → the fp16 constant that it is, widened: scales of 4-bit weights
        node.output[0]: node.input[0]
        for node in graph.nodes
        if node.op_type == "Cast" and node.input[0] in graph.tensors and graph.tensors[node.input[0]].dtype == FLOAT16
    }
    inputs = {}
    for name, info in graph.inputs.items():
        state = name.startswith("past_")
        inputs[name] = _typed(info, FLOAT16) if state else info
        if info.type.tensor_type.elem_type == FLOAT:
            kinds[name] = FLOAT16 if state else FLOAT
    starts = {name for name, kind in kinds.items() if kind == FLOAT}  # hidden values enter here

    def as_kind(name: str, kind: int) -> str:
        """A constant or value in the type wanted."""
        if name in constants:
            key = name if kind == FLOAT16 else f"{name}.fp32"
            tensors[key] = replace(graph.tensors[name], dtype=kind)
            return key
        if kind == FLOAT16 and name in stored:
            return stored[name]
        if kinds.get(name, kind) == kind:
            return name
        if (name, kind) not in cast:
            cast[name, kind] = f"{name}.{'fp16' if kind == FLOAT16 else 'fp32'}"
            nodes.append(helper.make_node("Cast", [name], [cast[name, kind]], cast[name, kind], to=kind))
        return cast[name, kind]

    for node in graph.nodes:
        read = reads(node)
        floats = [name for name in read if name in kinds]
        hidden = any(kinds[name] == FLOAT16 or name in starts for name in floats)
        hidden = hidden or (
            node.op_type == "Gather" and node.input[0] in constants
        )  # of token embeddings, or of a convolution's taps
        kind = FLOAT16 if hidden and node.name not in stay else FLOAT
        new = onnx.NodeProto()
        new.CopyFrom(node)
        measures = node.op_type == "Shape"  # takes any type
        if not measures:
            new.input[:] = [as_kind(name, kind) if name in kinds or name in constants else name for name in node.input]
        for name in sorted(read & graph.tensors.keys() - constants):  # the same file each time
            tensors[name] = graph.tensors[name]
        nodes.append(new)
        to = next((a.i for a in node.attribute if node.op_type == "Cast" and a.name == "to"), None)
        if to == FLOAT and node.input[0] in starts:  # in a graph made of an fp16 one: where hidden values entered it
            new.input[0] = node.input[0]
            next(a for a in new.attribute if a.name == "to").i = kinds[node.output[0]] = FLOAT16
        elif not measures and (to == FLOAT or (to is None and (floats or any(n in constants for n in read)))):
            kinds |= dict.fromkeys(node.output, FLOAT if to == FLOAT else kind)
    outputs = []
    for info in graph.outputs:
        state = info.name.startswith(("present", CONV_WINDOW))
        outputs.append(_typed(info, FLOAT16) if state else info)
        if kinds[info.name] != (FLOAT16 if state else FLOAT):
            _rename_output(nodes, info.name, f"{info.name}.inner")
            nodes.append(
                helper.make_node(
                    "Cast", [f"{info.name}.inner"], [info.name], f"{info.name}.cast", to=FLOAT16 if state else FLOAT
                )
            )
    made = replace(graph, nodes=nodes, tensors=tensors, inputs=inputs, outputs=outputs)
    return made.part([info.name for info in outputs])  # without the casts of what is read as it is stored


def overflowing(graph: Graph, feeds: Sequence[Feeds], threads: int) -> list[str]:
    """Nodes of an fp32 graph with a value, or a constant, beyond fp16's range on these samples."""
    large = {name for name, t in graph.tensors.items() if t.dtype == FLOAT and _largest(t.array) > LARGEST}
    states: list[Values] = [{} for _ in feeds]

    def note(_: int, values: Values) -> None:
        large.update(name for name, v in values.items() if v.dtype == np.float32 and _largest(v) > LARGEST)

    for block in blocks_of(graph) if feeds else []:
        inside = [name for node in graph.part(block.outputs, block.cut).nodes for name in node.output if name]
        states = run_block(graph, block, feeds, states, threads, inside, note)
    return [node.name for node in graph.nodes if large.intersection([*reads(node), *node.output])]


def _largest(values: np.ndarray) -> float:
    found = np.abs(values).max() if values.size else 0.0
    return float(found) if np.isfinite(found) else float("inf")


def _typed(info: onnx.ValueInfoProto, kind: int) -> onnx.ValueInfoProto:
    changed = onnx.ValueInfoProto()
    changed.CopyFrom(info)
    changed.type.tensor_type.elem_type = kind
    return changed


def _rename_output(nodes: Sequence[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        node.output[:] = [new if name == old else name for name in node.output]
        node.input[:] = [new if name == old else name for name in node.input]
