"""What GPUs want of a graph beside fp16: a decoder that need not send its logits to the host, and for TensorRT an encoder in standard
operators. Both are graphs over weights that lie in another variant's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from lfm_runtime.contract import NEXT_MASK, TOP_IDS, TOP_LOGITS, TOP_TOKENS
from onnx import helper

from lfm_quantize.graph import FLOAT, FLOAT16, INT64, Graph, Place, QuantizeError, Tensor


def for_gpu(decoder: Graph) -> Graph:
    """A decoder that also gives out its likeliest tokens and the mask of its next step, so that all the rest stays on the device. The mask
    is summed in fp32, where CUDA needs no cuDNN for it; ones add up exactly to 2²⁴.
    """
    logits = next(o for o in decoder.outputs if o.name == "logits").type.tensor_type.shape
    count = min(TOP_TOKENS, logits.dim[2].dim_value)
    constants = {"gpu.count": count, "gpu.first": 0, "gpu.axis": 1, "gpu.last": -1}
    tensors = {name: Tensor.of(np.array([value], np.int64)) for name, value in constants.items()}
    nodes = [
        helper.make_node("TopK", ["logits", "gpu.count"], [TOP_LOGITS, TOP_IDS], "gpu.likeliest"),
        # Padding is on the right and the first token always there: the mask with one token more is itself, moved by one.
        helper.make_node("Slice", ["attention_mask", "gpu.first", "gpu.axis", "gpu.axis"], ["gpu.there"], "gpu.there"),
        helper.make_node("Slice", ["attention_mask", "gpu.first", "gpu.last", "gpu.axis"], ["gpu.before"], "gpu.before"),
        helper.make_node("Concat", ["gpu.there", "gpu.before"], [NEXT_MASK], "gpu.next_mask", axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info(TOP_LOGITS, FLOAT, ["batch", "positions", count]),
        helper.make_tensor_value_info(TOP_IDS, INT64, ["batch", "positions", count]),
        helper.make_tensor_value_info(NEXT_MASK, INT64, ["batch", "past_and_tokens"]),
    ]
    summed = next((n for n in decoder.nodes if n.op_type == "ReduceSum" and n.input[0] == "attention_mask"), None)
    if summed:  # export --dtype fp16 writes it so from the start
        counted = onnx.NodeProto()
        counted.CopyFrom(summed)
        counted.input[0], counted.output[0] = "gpu.mask", "gpu.sum"
        decoder = decoder.replaced({summed.name: [
            helper.make_node("Cast", ["attention_mask"], ["gpu.mask"], "gpu.mask", to=FLOAT), counted,
            helper.make_node("Cast", ["gpu.sum"], [summed.output[0]], "gpu.sum", to=INT64),
        ]}, {})  # fmt: skip
    return replace(decoder, nodes=[*decoder.nodes, *nodes], tensors={**decoder.tensors, **tensors}, outputs=[*decoder.outputs, *outputs])


def over_its_files(graph: Graph, original: Graph) -> Graph:
    """`graph`, made of `original`, with the constants that did not change where they lie in `original`'s files."""
    known = {name: t for name, t in original.tensors.items() if t.source}
    places = {name: Place(t.source.name, t.offset, t.data.nbytes) for name, t in known.items() if t.source}
    tensors = {name: replace(t, place=places[name]) if t is known.get(name) else t for name, t in graph.tensors.items()}
    return replace(graph, tensors=tensors)


def in_standard_operators(vision: Graph) -> Graph:
    """The encoder without operators of onnxruntime's own and without branches, for unpadded views of one size: what TensorRT can take
    as a whole but for the gathering of tokens. Attention is softmax(q kᵀ / sqrt(d)) v.

    Raises:
        QuantizeError: attention is not as export builds it.
    """
    nodes: dict[str, list[onnx.NodeProto]] = {}
    tensors: dict[str, Tensor] = {}
    for node in vision.nodes:
        if node.op_type == "If":
            inner = _branch(node)
            if [n.op_type for n in inner] != ["MultiHeadAttention"]:
                raise QuantizeError(f"{vision.name}: {node.name} is not attention as lfm-edge export builds it; export the bundle again")
            heads = next(a.i for a in inner[0].attribute if a.name == "num_heads")
            nodes[node.name], made = _attention(node.name, list(inner[0].input[:3]), node.output[0], heads, vision)
            tensors |= made
    if not nodes:
        raise QuantizeError(f"{vision.name} has no attention of onnxruntime's own: it is in standard operators as it is")
    return vision.replaced(nodes, tensors)


def _branch(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Of an If: what is run where nothing is padded."""
    return list(next(a.g for a in node.attribute if a.name == "then_branch").node)


def _attention(
    name: str, inputs: list[str], output: str, heads: int, vision: Graph
) -> tuple[list[onnx.NodeProto], Mapping[str, Tensor]]:
    """Query, key and value [views, patches, heads · d] → [views, patches, heads · d]."""
    weight = vision.tensors.get(f"{name.removesuffix('.attention')}.qkv.weight")
    if weight is None:
        raise QuantizeError(
            f"{vision.name}: {name} is kept fp32, since fp16 does not hold its values or --keep names it; TensorRT's graph is of one type: "
            "stay with fp16"
        )
    width = weight.shape[1] // 3
    kind = np.float16 if weight.dtype == FLOAT16 else np.float32
    tensors = {
        "attention.heads": Tensor.of(np.array([0, 0, heads, width // heads], np.int64)),
        "attention.joined": Tensor.of(np.array([0, 0, width], np.int64)),
        "attention.scale": Tensor.of(np.array((width // heads) ** -0.5, kind)),
    }
    nodes = []
    for value, order, short in zip(inputs, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), ("q", "k", "v"), strict=True):
        nodes.append(helper.make_node("Reshape", [value, "attention.heads"], [f"{name}.{short}.split"], f"{name}.{short}.split"))
        nodes.append(helper.make_node("Transpose", [f"{name}.{short}.split"], [f"{name}.{short}"], f"{name}.{short}", perm=order))
    nodes += [
        # Scaled before the product, whose fp16 sums could overflow.
        helper.make_node("Mul", [f"{name}.q", "attention.scale"], [f"{name}.scaled"], f"{name}.scaled"),
        helper.make_node("MatMul", [f"{name}.scaled", f"{name}.k"], [f"{name}.scores"], f"{name}.scores"),
        helper.make_node("Softmax", [f"{name}.scores"], [f"{name}.shares"], f"{name}.shares", axis=-1),
        helper.make_node("MatMul", [f"{name}.shares", f"{name}.v"], [f"{name}.mixed"], f"{name}.mixed"),
        helper.make_node("Transpose", [f"{name}.mixed"], [f"{name}.together"], f"{name}.together", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", [f"{name}.together", "attention.joined"], [output], f"{name}.joined"),
    ]
    return nodes, tensors
