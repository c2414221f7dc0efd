"""The encoder's attention in 8 bits, one head after the other.

Queries have one scale for a head, keys one for each patch, values one for each of a head's dimensions, all found as the
graph runs. Keys and values are taken about their mean over the patches: a softmax does not see what all keys share, and
what all values share is added again at the end, so it loses nothing where small shares become zero. (Both as
SageAttention, arXiv:2410.02367 and 2411.10958, does; it keeps the second product in 16 bits, for which onnxruntime has
no kernel on x86.) Each row of shares has a scale of its own, of its largest.

The heads are the steps of a Scan: a head's scores, 4 MB for 1,024 patches, are written and read back while they are in
cache, and the graph has these nodes once a layer. What that gains, and where it loses, is in docs/log/2026-11-28.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lfm_quantize.graph import CONTRIB, FLOAT, linears
from lfm_quantize.passes.nodes import constant_of, exchange, node


def attentions(model: ir.Model, nodes: Iterable[ir.Node] | None = None) -> dict[str, ir.Node]:
    """The encoder's attentions as export builds them, by name, in order; of `nodes` alone where they are given."""
    found = (n for n in (model.graph if nodes is None else nodes) if n.op_type == "If")
    return {str(n.name): n for n in found if [i.op_type for i in _branch(n)] == ["MultiHeadAttention"]}


def _branch(choice: ir.Node) -> ir.Graph:
    """What is computed for views without padding."""
    return choice.attributes["then_branch"].as_graph()


class IntegerAttention(ir.passes.InPlacePass):
    """MultiHeadAttention of views without padding → products of 8-bit integers, in the attentions named. Names of other
    graphs are left alone, and so are padded views, which this runtime does not make.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange the operators in place."""
        found = {name: choice for name, choice in attentions(model).items() if name in self.names}
        products = linears(model) if found else {}
        for name, choice in found.items():
            branch, width = _branch(choice), products[f"{name.removesuffix('attention')}out_proj"].k
            exchange(branch, branch[0], _by_heads(model.graph, name, branch[0], width))
        return ir.passes.PassResult(model, bool(found))


class _Nodes:
    """The nodes of one attention, named after it; their constants are the graph's, the same for all attentions."""

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self.graph, self.name, self.made = graph, name, list[ir.Node]()

    def add(self, op_type: str, given: Sequence[ir.Value | None], short: str, **attributes: Any) -> ir.Value:
        """One more node, with one output; returns that."""
        self.made.append(node(op_type, given, f"{self.name}.{short}", **attributes))
        return self.made[-1].outputs[0]

    def constant(self, short: str, value: Any, kind: Any = np.int64) -> ir.Value:
        """A constant of the graph."""
        return constant_of(self.graph, f"attention.{short}", np.array(value, kind))


def _by_heads(graph: ir.Graph, name: str, attend: ir.Node, width: int) -> list[ir.Node]:
    """Query, key and value [views, patches, heads · d] → [views, patches, heads · d]."""
    new = _Nodes(graph, name)
    add, constant = new.add, new.constant
    heads = attend.attributes["num_heads"].as_int()
    size = width // heads
    query, key, value = attend.inputs[:3]
    split, joined = constant("split", [0, 0, heads, size]), constant("joined", [0, 0, width])
    every, dimensions = constant("every", [-1]), constant("size", [size])
    patches = add("Shape", [query], "patches", start=1, end=2)
    by_patch = add("Concat", [every, patches, dimensions], "by_patch", axis=0)
    by_dimension = add("Concat", [every, dimensions, patches], "by_dimension", axis=0)
    by_key = add("Concat", [every, patches], "by_key", axis=0)
    by_head = add("Concat", [constant("views", [-1, heads]), patches, dimensions], "by_head", axis=0)

    middle, signed = constant("middle", 128, np.uint8), constant("signed", 0, np.int8)
    means = _means(new, patches)
    key_mean, value_mean = add("MatMul", [means, key], "k.mean"), add("MatMul", [means, value], "v.mean")
    centred = add("Sub", [key, key_mean], "k.centred"), add("Sub", [value, value_mean], "v.centred")
    q = add("Reshape", [query, split], "q.split")
    k, v = (add("Reshape", [x, split], f"{part}.split") for x, part in zip(centred, "kv", strict=True))
    q, q_scale = _coded(new, "q", q, _largest(new, "q", q, [3, 1]), middle)
    k, k_scale = _coded(new, "k", k, _largest(new, "k", k, [3]), signed)
    v, v_scale = _coded(new, "v", v, _largest_of_patches(new, "v", v, patches, heads, size), signed)
    q_scale = add("Mul", [q_scale, constant("scale", size**-0.5, np.float32)], "q.step")

    taken = [
        add("Reshape", [add("Transpose", [q], "q.turned", perm=[0, 2, 1, 3]), by_patch], "q.heads"),
        add("Reshape", [q_scale, every], "q.steps"),
        add("Reshape", [add("Transpose", [k], "k.turned", perm=[0, 2, 3, 1]), by_dimension], "k.heads"),
        add("Reshape", [add("Transpose", [k_scale], "k.scales", perm=[0, 2, 3, 1]), by_key], "k.steps"),
        add("Reshape", [add("Transpose", [v], "v.turned", perm=[0, 2, 1, 3]), by_patch], "v.heads"),
        add("Reshape", [v_scale, constant("by_size", [-1, size])], "v.steps"),
    ]
    zeros = add("Expand", [constant("none", 0, np.uint8), patches], "zeros")
    mixed = add("Scan", taken, "mixed", body=_head(graph, f"{name}.head", zeros, size), num_scan_inputs=len(taken))
    turned = add("Transpose", [add("Reshape", [mixed, by_head], "heads")], "together", perm=[0, 2, 1, 3])
    together = add("Reshape", [turned, joined], "joined")
    return [*new.made, node("Add", [together, value_mean], str(attend.outputs[0].name), f"{name}.attend")]


def _means(new: _Nodes, patches: ir.Value) -> ir.Value:
    """A row that a product with gives the mean over the patches: six times as fast as ReduceMean."""
    one, count = new.constant("one", 1, np.float32), new.add("Cast", [patches], "count", to=FLOAT)
    row = new.add("Concat", [new.constant("ones", [1]), patches], "row", axis=0)
    return new.add("Expand", [new.add("Div", [one, count], "weight"), row], "weights")


def _largest(new: _Nodes, part: str, value: ir.Value, axes: Sequence[int]) -> ir.Value:
    """The largest magnitude along these axes, of which the last is to be first, where it is fast."""
    found = new.add("Abs", [value], f"{part}.sizes")
    for axis in axes:
        found = new.add("ReduceMax", [found, new.constant(f"axis_{axis}", [axis])], f"{part}.largest_{axis}")
    return found


def _largest_of_patches(new: _Nodes, part: str, value: ir.Value, patches: ir.Value, heads: int, size: int) -> ir.Value:
    """The largest magnitude over the patches, [views, 1, heads, d]: of four groups, then of these, where four divides
    their number, as it does where 2 x 2 become an image token. onnxruntime reduces one group in one thread, number by
    number: 1.0 ms for 1,024 patches, in four groups 0.2.
    """
    add, constant = new.add, new.constant
    four, first = constant("four", [4]), constant("axis_1", [1])
    rest = add("Mod", [patches, four], f"{part}.rest")
    groups = add(
        "Where",
        [add("Equal", [rest, constant("zero", [0])], f"{part}.even"), four, constant("ones", [1])],
        f"{part}.groups",
    )
    every, each = constant("every", [-1]), add("Div", [patches, groups], f"{part}.each")
    by_group = add("Concat", [every, each, constant("width", [heads * size])], f"{part}.by_group", axis=0)
    by_view = add("Concat", [every, groups, constant("heads_size", [heads, size])], f"{part}.by_view", axis=0)
    grouped = add("Reshape", [add("Abs", [value], f"{part}.sizes"), by_group], f"{part}.grouped")
    found = add("ReduceMax", [grouped, first], f"{part}.largest_of_group")
    return add("ReduceMax", [add("Reshape", [found, by_view], f"{part}.of_groups"), first], f"{part}.largest")


def _coded(new: _Nodes, part: str, value: ir.Value, largest: ir.Value, zero: ir.Value) -> tuple[ir.Value, ir.Value]:
    """8-bit codes of [views, patches, heads, d], and their scales, from the largest magnitudes that share one."""
    above_zero = new.add("Max", [largest, new.constant("tiny", 1e-20, np.float32)], f"{part}.range")
    scale = new.add("Mul", [above_zero, new.constant("step", 1 / 127, np.float32)], f"{part}.scale")
    scaled = new.add("Div", [value, scale], f"{part}.scaled")
    return new.add("QuantizeLinear", [scaled, new.constant("one", 1, np.float32), zero], f"{part}.codes"), scale


def _head(graph: ir.Graph, name: str, zeros: ir.Value, size: int) -> ir.Graph:
    """One head's queries [patches, d], keys [d, patches] and values [patches, d] with their scales → [patches, d]."""
    new = _Nodes(graph, name)
    add, constant = new.add, new.constant
    byte, integer, number = (ir.TensorType(t) for t in (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.FLOAT))
    query, query_step, keys, key_steps, values, value_steps = given = [
        ir.Value(name=f"{name}.query", type=byte, shape=ir.Shape([None, size])),
        ir.Value(name=f"{name}.query_step", type=number, shape=ir.Shape([])),
        ir.Value(name=f"{name}.keys", type=integer, shape=ir.Shape([size, None])),
        ir.Value(name=f"{name}.key_steps", type=number, shape=ir.Shape([None])),
        ir.Value(name=f"{name}.values", type=integer, shape=ir.Shape([None, size])),
        ir.Value(name=f"{name}.value_steps", type=number, shape=ir.Shape([size])),
    ]
    last, one = constant("every", [-1]), constant("one", 1, np.float32)
    middle, none = constant("middle", 128, np.uint8), constant("none", 0, np.uint8)
    scores = add("MatMulIntegerToFloat", [query, keys, query_step, key_steps, middle], "scores", domain=CONTRIB)
    shares = add("Softmax", [scores], "shares", axis=-1)
    largest = add("ReduceMax", [shares, last], "largest")
    steps = add("Mul", [largest, constant("share", 1 / 255, np.float32)], "steps")
    codes = add("QuantizeLinear", [shares, add("Squeeze", [steps, last], "rows"), zeros], "codes", axis=0)
    mixed = add("MatMulIntegerToFloat", [codes, values, one, value_steps, none], "mixed", domain=CONTRIB)
    result = add("Mul", [mixed, steps], "result")
    result.type, result.shape = number, ir.Shape([None, size])
    return ir.Graph(given, [result], nodes=new.made, name=name)
