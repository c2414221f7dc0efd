"""Keys and values remembered in 8 bits instead of 32, each channel of each head with a scale of its own: a quarter of
the memory a long prompt takes. A second decoder graph over the weights of the first; onnxruntime's attention reads and
writes the integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from lfm_runtime.formats.contract import KV_SCALES, present_name
from numpy.typing import NDArray
from onnx import helper

from lfm_quantize.calibrate.blocks import Feeds, Values, blocks_of, run_block
from lfm_quantize.graph import Graph, Place, QuantizeError, Tensor

FIRST_ONNXRUNTIME = "1.27.0"
"""Whose CPU kernel of GroupQueryAttention takes an int8 past (1.26 fails when it runs)."""
_HEADROOM = 1.1
"""Other prompts go a little beyond the largest value seen; what is beyond the range is cut off."""
_K_SCALE = 12  # GroupQueryAttention's inputs: k_scale, v_scale

Float = NDArray[np.float32]


def largest_states(graph: Graph, feeds: Sequence[Feeds], threads: int) -> dict[str, Float]:
    """Past input of an attention layer → largest magnitude of each channel [kv heads, head dim] over all samples,
    rotated as it is kept.
    """
    presents = {present_name(name): name for name in graph.inputs if name.startswith("past_key_values.")}
    found: dict[str, Float] = {}

    def seen(_: int, values: Values) -> None:
        for present, past in presents.items():
            if present in values:
                most = np.abs(values[present]).max((0, 2))
                found[past] = np.maximum(found.get(past, 0), most)

    states: list[Values] = [{} for _ in feeds]
    for block in blocks_of(graph):
        if block.name == "head":
            break
        taps = [name for node in graph.part(block.outputs, block.cut).nodes for name in node.output if name in presents]
        states = run_block(graph, block, feeds, states, threads, taps, seen)
        graph.release()
    return found


def int8_kv(graph: Graph, largest: Mapping[str, Float]) -> Graph:
    """The decoder with int8 pasts and presents. Its constants stay where they lie.

    Raises:
        QuantizeError: the decoder's attention is not GroupQueryAttention.
    """
    nodes: dict[str, list[onnx.NodeProto]] = {}
    scales: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op_type != "GroupQueryAttention":
            continue
        new = onnx.NodeProto()
        new.CopyFrom(node)
        del new.input[:]
        names = [f"{past}.scale" for past in node.input[3:5]]
        new.input.extend([*node.input, *[""] * (_K_SCALE - len(node.input)), *names])
        for key, value in (("k_quant_type", "PER_CHANNEL"), ("v_quant_type", "PER_CHANNEL"), ("kv_cache_bit_width", 8)):
            new.attribute.append(helper.make_attribute(key, value))
        for name, past in zip(names, node.input[3:5], strict=True):
            scale = np.maximum(largest[past] * np.float32(_HEADROOM / 127), np.float32(1e-8))
            scales[name] = Tensor.of(scale[None, :, None])
        nodes[node.name] = [new]
    if 2 * len(nodes) != len(largest):
        raise QuantizeError(f"{graph.name} has attention that is not GroupQueryAttention; export the bundle again")
    kept = {
        name: replace(t, place=Place(t.source.name, t.offset, t.data.nbytes))
        for name, t in graph.tensors.items()
        if t.source
    }
    new_graph = replace(graph, tensors={**graph.tensors, **kept}).replaced(nodes, scales)
    digest = hashlib.sha256(b"".join(scales[name].array.tobytes() for name in sorted(scales))).hexdigest()
    return replace(
        new_graph,
        metadata={KV_SCALES: digest},
        inputs={name: _as_int8(info) if name in largest else info for name, info in graph.inputs.items()},
        outputs=[_as_int8(info) if info.name in map(present_name, largest) else info for info in graph.outputs],
    )


def _as_int8(info: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    new = onnx.ValueInfoProto()
    new.CopyFrom(info)
    new.type.tensor_type.elem_type = onnx.TensorProto.INT8
    return new
