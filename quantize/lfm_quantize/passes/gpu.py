"""What GPUs want of a graph beside fp16: a decoder that need not send its logits to the host and computes its short
convolutions in one kernel each, an encoder that goes over its activations less often, and for TensorRT one in standard
operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from lfm_runtime.formats.contract import CONV_WINDOW, NEXT_MASK, POSITIONS, TOP_IDS, TOP_LOGITS, TOP_TOKENS
from onnx import helper, numpy_helper

from lfm_quantize.graph import CONTRIB, FLOAT, FLOAT16, INT64, Graph, Place, QuantizeError, Tensor, reads

_CONV = "CausalConvWithState"
_END = np.iinfo(np.int64).max


def for_gpu(decoder: Graph) -> Graph:
    """A decoder that also gives out its likeliest tokens and the mask of its next step, so that all the rest stays on
    the device. The mask is summed in fp32, where CUDA needs no cuDNN for it; ones add up exactly to 2²⁴.
    """
    logits = next(o for o in decoder.outputs if o.name == "logits").type.tensor_type.shape
    count = min(TOP_TOKENS, logits.dim[2].dim_value)
    constants = {"gpu.count": count, "gpu.first": 0, "gpu.axis": 1, "gpu.last": -1}
    tensors = {name: Tensor.of(np.array([value], np.int64)) for name, value in constants.items()}
    nodes = [
        helper.make_node("TopK", ["logits", "gpu.count"], [TOP_LOGITS, TOP_IDS], "gpu.likeliest"),
        # Padding is on the right and the first token always there: the mask with one token more is itself, moved by
        # one.
        helper.make_node("Slice", ["attention_mask", "gpu.first", "gpu.axis", "gpu.axis"], ["gpu.there"], "gpu.there"),
        helper.make_node(
            "Slice", ["attention_mask", "gpu.first", "gpu.last", "gpu.axis"], ["gpu.before"], "gpu.before"
        ),
        helper.make_node("Concat", ["gpu.there", "gpu.before"], [NEXT_MASK], "gpu.next_mask", axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info(TOP_LOGITS, FLOAT, ["batch", POSITIONS, count]),
        helper.make_tensor_value_info(TOP_IDS, INT64, ["batch", POSITIONS, count]),
        helper.make_tensor_value_info(NEXT_MASK, INT64, ["batch", "past_and_tokens"]),
    ]
    summed = next((n for n in decoder.nodes if n.op_type == "ReduceSum" and n.input[0] == "attention_mask"), None)
    if summed:  # export --dtype fp16 writes it so from the start
        counted = onnx.NodeProto()
        counted.CopyFrom(summed)
        counted.input[0], counted.output[0] = "gpu.mask", "gpu.sum"
        decoder = decoder.replaced(
            {
                summed.name: [
                    helper.make_node("Cast", ["attention_mask"], ["gpu.mask"], "gpu.mask", to=FLOAT),
                    counted,
                    helper.make_node("Cast", ["gpu.sum"], [summed.output[0]], "gpu.sum", to=INT64),
                ]
            },
            {},
        )
    decoder = replace(
        decoder,
        nodes=[*decoder.nodes, *nodes],
        tensors={**decoder.tensors, **tensors},
        outputs=[*decoder.outputs, *outputs],
    )
    return fused_convolutions(decoder)


# --------------------------------------------------------------------------------------------------- short convolutions


def fused_convolutions(decoder: Graph) -> Graph:
    """Each short convolution as one CausalConvWithState, which CUDA has since onnxruntime 1.25: 6 kernels for 15. The
    graph brings along what that operator is, as a function of standard operators, which older releases compute instead.

    A zero before the taps makes the operator's state, one entry less than its kernel, the hub's, which is as long as
    the kernel. What a convolution has read is no output any more. Those that are kept fp32 are left as they are.
    """
    made_by = {name: node for node in decoder.nodes for name in node.output}
    nodes: dict[str, list[onnx.NodeProto]] = {}
    tensors: dict[str, Tensor] = {}
    functions: list[onnx.FunctionProto] = []
    for window in [o.name for o in decoder.outputs if o.name.startswith(CONV_WINDOW)]:
        layer = window.removeprefix(CONV_WINDOW)
        past, present, place = f"past_conv.{layer}", f"present_conv.{layer}", f"text.layers.{layer}.conv.conv"
        taps, bias = decoder.tensors.get(f"{place}.weight"), decoder.tensors.get(f"{place}.bias")
        joined = made_by[window]
        product = made_by.get(joined.input[-1])
        split = made_by.get(product.input[0]) if product else None
        if (
            taps is None
            or taps.dtype != FLOAT16
            or split is None
            or (joined.op_type, split.op_type) != ("Concat", "Split")
        ):
            continue  # something of it is kept fp32, and casts lie between
        signal, gate = joined.input[1], split.output[1]
        gated = next(node for node in decoder.nodes if gate in node.input)
        if gated.op_type != "Mul":
            continue
        convolved = next(name for name in gated.input if name != gate)
        tensors[f"{place}.taps"] = Tensor.of(np.pad(taps.array.T[:, None], ((0, 0), (0, 0), (1, 0))))
        given = [f"{place}.channels", f"{place}.taps", f"{place}.bias" if bias else "", past]
        nodes[joined.name] = [
            helper.make_node("Transpose", [signal], given[:1], given[0], perm=[0, 2, 1]),
            helper.make_node(_CONV, given, [f"{place}.convolved", present], place, domain=CONTRIB),
            helper.make_node("Transpose", [f"{place}.convolved"], [convolved], f"{place}.tokens", perm=[0, 2, 1]),
        ]
        nodes[made_by[convolved].name] = nodes[made_by[present].name] = []
        functions = [_convolution(taps.shape[0], bias=bias is not None)]
    made = replace(decoder.replaced(nodes, tensors), functions=functions)
    outputs = [o for o in made.outputs if not o.name.startswith(CONV_WINDOW)]
    return made.part([o.name for o in outputs])


def _convolution(kernel: int, *, bias: bool) -> onnx.FunctionProto:
    """CausalConvWithState as all layers use it, in standard operators: x [B, H, S], taps [H, 1, 1 + kernel] of which
    the first is 0, bias [H], past [B, H, kernel] → y [B, H, S], present [B, H, kernel].
    """
    nodes = [helper.make_node("Concat", ["past", "x"], ["full"], axis=2)]

    def constant(*values: int) -> str:
        name = f"c{len(nodes)}"
        nodes.append(
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(values, np.int64)))
        )
        return name

    def add(op_type: str, *inputs: str) -> str:
        name = f"v{len(nodes)}"
        nodes.append(helper.make_node(op_type, list(inputs), [name]))
        return name

    total = ""
    for k in range(1, kernel + 1):
        end = k - kernel if k < kernel else _END
        read = add("Slice", "full", constant(k), constant(end), constant(2))
        tap = add("Squeeze", add("Slice", "taps", constant(k), constant(k + 1), constant(2)), constant(1))
        term = add("Mul", read, tap)
        total = add("Add", total, term) if total else term
    if bias:
        total = add("Add", total, add("Unsqueeze", "bias", constant(1)))
    nodes.append(helper.make_node("Identity", [total], ["y"]))
    nodes.append(helper.make_node("Slice", ["full", constant(-kernel), constant(_END), constant(2)], ["present"]))
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_function(CONTRIB, _CONV, ["x", "taps", "bias", "past"], ["y", "present"], nodes, opsets)


# ------------------------------------------------------------------------------------------------------------- encoder


def fused_biases(vision: Graph) -> Graph:
    """Biases are added where a norm or an activation reads the values anyway. CUDA's Gemm writes its bias to every row
    of its output first, and reads it there; the CPU's does not. Products whose bias or norm is kept fp32 are left as
    they are.
    """
    made_by = {name: node for node in vision.nodes for name in node.output}
    used = Counter(name for node in vision.nodes for name in reads(node))
    nodes: dict[str, list[onnx.NodeProto]] = {}

    def product(name: str) -> onnx.NodeProto | None:
        """The fp16 Gemm with a bias that makes this value for one reader alone."""
        node = made_by.get(name)
        alone = node is not None and node.op_type == "Gemm" and len(node.input) == 3 and used[name] == 1
        return node if node and alone and vision.tensors[node.input[2]].dtype == FLOAT16 else None

    def without_bias(gemm: onnx.NodeProto) -> str:
        nodes[gemm.name] = [helper.make_node("MatMul", gemm.input[:2], [f"{gemm.name}.product"], gemm.name)]
        return f"{gemm.name}.product"

    for node in vision.nodes:
        total = made_by.get(node.input[0]) if node.input else None
        if node.op_type == "LayerNormalization" and total is not None and total.op_type == "Add":
            gemm = next(filter(None, map(product, total.input)), None)
            if gemm is None or vision.tensors[node.input[1]].dtype != FLOAT16:
                continue
            skip = next(name for name in total.input if name != gemm.output[0])
            epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
            given = [without_bias(gemm), skip, *node.input[1:], gemm.input[2]]
            made = [node.output[0], "", "", total.output[0]]  # the total under its name, by which layers are compared
            nodes[total.name] = []
            nodes[node.name] = [
                helper.make_node("SkipLayerNormalization", given, made, node.name, domain=CONTRIB, epsilon=epsilon)
            ]
        elif (
            node.op_type == "Gelu"
            and any(a.s == b"tanh" for a in node.attribute)
            and (gemm := product(node.input[0])) is not None
        ):
            given = [without_bias(gemm), gemm.input[2]]
            nodes[node.name] = [helper.make_node("FastGelu", given, list(node.output), node.name, domain=CONTRIB)]
    return vision.replaced(nodes, {})


def _apart(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """What `fused_biases` put together, in standard operators."""
    biased = f"{node.name}.biased"
    if node.op_type == "FastGelu":
        return [
            helper.make_node("Add", node.input, [biased], biased),
            helper.make_node("Gelu", [biased], node.output, node.name, approximate="tanh"),
        ]
    product, skip, scale, offset, bias = node.input
    normed, _, _, total = node.output
    epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
    return [
        helper.make_node("Add", [product, bias], [biased], biased),
        helper.make_node("Add", [biased, skip], [total], f"{node.name}.total"),
        helper.make_node("LayerNormalization", [total, scale, offset], [normed], node.name, axis=-1, epsilon=epsilon),
    ]


# ----------------------------------------------------------------------------------------- over files, for TensorRT


def over_its_files(graph: Graph, original: Graph) -> Graph:
    """`graph`, made of `original`, with the constants that did not change where they lie in `original`'s files."""
    known = {name: t for name, t in original.tensors.items() if t.source}
    places = {name: Place(t.source.name, t.offset, t.data.nbytes) for name, t in known.items() if t.source}
    tensors = {name: replace(t, place=places[name]) if t is known.get(name) else t for name, t in graph.tensors.items()}
    return replace(graph, tensors=tensors)


def in_standard_operators(vision: Graph) -> Graph:
    """The encoder without operators of onnxruntime's own and without branches, for unpadded views of one size: what
    TensorRT can take as a whole but for the gathering of tokens. Attention is softmax(q kᵀ / sqrt(d)) v.

    Raises:
        QuantizeError: attention is not as export builds it.
    """
    nodes: dict[str, list[onnx.NodeProto]] = {}
    tensors: dict[str, Tensor] = {}
    for node in vision.nodes:
        if node.op_type == "If":
            inner = _branch(node)
            if [n.op_type for n in inner] != ["MultiHeadAttention"]:
                raise QuantizeError(
                    f"{vision.name}: {node.name} is not attention as lfm-edge export builds it; export the bundle again"
                )
            heads = next(a.i for a in inner[0].attribute if a.name == "num_heads")
            nodes[node.name], made = _attention(node.name, list(inner[0].input[:3]), node.output[0], heads, vision)
            tensors |= made
        elif node.op_type in ("FastGelu", "SkipLayerNormalization"):
            nodes[node.name] = _apart(node)
    if not tensors:
        raise QuantizeError(
            f"{vision.name} has no attention of onnxruntime's own: it is in standard operators as it is"
        )
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
            f"{vision.name}: {name} is kept fp32, since fp16 does not hold its values or --keep names it; "
            "TensorRT's graph is of one type: "
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
        nodes.append(
            helper.make_node("Reshape", [value, "attention.heads"], [f"{name}.{short}.split"], f"{name}.{short}.split")
        )
        nodes.append(
            helper.make_node("Transpose", [f"{name}.{short}.split"], [f"{name}.{short}"], f"{name}.{short}", perm=order)
        )
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
