"""A graph as a row of blocks (one transformer layer each), run one at a time over all samples.

One block's weights are in memory at a time; between blocks stand only the samples' hidden states. That is what makes a
model larger than memory's share quantizable, and a killed run resumable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from lfm_quantize.calibrate.samples import Sample
from lfm_quantize.graph import Graph, QuantizeError

Feeds = dict[str, NDArray[Any]]
Values = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Block:
    """Part of a graph between two cuts."""

    name: str
    cut: tuple[str, ...]  # values it starts from
    outputs: tuple[str, ...]  # values the next one starts from
    linears: tuple[str, ...]


def blocks_of(graph: Graph) -> list[Block]:
    """The blocks of a vision encoder or decoder graph, in order; a block ends where the next layer's norm begins."""
    nodes = {node.name: node for node in graph.nodes}
    vision = graph.name == "vision_encoder"
    first, norm, last = (
        ("vision.embeddings", "vision.encoder.layers.{}.layer_norm1", "vision.post_layernorm")
        if vision
        else ("text.embeddings", "text.layers.{}.operator_norm", "text.embedding_norm")
    )
    count = next(i for i in range(10_000) if norm.format(i) not in nodes)
    names = [norm.format(i) for i in range(count)] + [last]
    cuts = [tuple(_residual(nodes[name])) for name in names]
    ends = [*cuts, (graph.outputs[0].name,)]
    starts = [(), *cuts]
    labels = [first, *(name.rsplit(".", 1)[0] for name in names[:-1]), "projector" if vision else "head"]
    blocks = []
    for label, cut, outputs in zip(labels, starts, ends, strict=True):
        part = graph.part(outputs, cut)
        if part.nodes:
            blocks.append(Block(label, cut, outputs, tuple(part.linears())))
    return blocks


def _residual(norm: onnx.NodeProto) -> list[str]:
    """What a norm normalises: one value, or two that it adds."""
    return list(norm.input[: 2 if norm.op_type.startswith("Skip") else 1])


def all_positions(graph: Graph) -> Graph:
    """The decoder with logits for every position: the graph slices the last ones out before the last feed-forward
    layer.
    """
    slices = {n.output[0]: n for n in graph.nodes if n.op_type == "Slice" and n.name.startswith("text.read.")}
    if len(slices) != 2:  # of what the last layer mixed, and of the residual
        raise QuantizeError(f"{graph.name} is of an older lfm-edge; export the bundle again")
    nodes = []
    for node in graph.nodes:
        if node.output[0] in slices:
            continue
        if any(name in slices for name in node.input):
            changed = onnx.NodeProto()
            changed.CopyFrom(node)
            changed.input[:] = [slices[name].input[0] if name in slices else name for name in node.input]
            nodes.append(changed)
        else:
            nodes.append(node)
    return Graph(graph.name, nodes, graph.tensors, graph.inputs, graph.outputs, graph.opset, graph.ir_version)


def decoder_feeds(graph: Graph, embeds: NDArray[np.float32]) -> Feeds:
    """Inputs for a whole prompt [1, S, H] at once, no past."""
    feeds: Feeds = {"inputs_embeds": embeds, "attention_mask": np.ones(embeds.shape[:2], np.int64)}
    for name, info in graph.inputs.items():
        if name.startswith("past_"):
            dims = info.type.tensor_type.shape.dim
            shape = [d.dim_value if d.HasField("dim_value") else int(i == 0) for i, d in enumerate(dims)]
            feeds[name] = np.zeros(shape, helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
    return feeds


def prompt_feeds(
    graph: Graph,
    samples: Sequence[Sample],
    kinds: Sequence[NDArray[np.bool_]],
    table: NDArray[np.float32],
    features: Sequence[NDArray[np.float32]],
) -> list[Feeds]:
    """The decoder's inputs for each sample: rows of the embedding table [V, H], image features where `kinds` says image
    token.
    """
    found = []
    for sample, is_image, image in zip(samples, kinds, features, strict=True):
        embeds = table[np.array(sample.ids)][None].astype(np.float32)
        embeds[0, is_image] = image
        found.append(decoder_feeds(graph, embeds))
    return found


def image_positions(samples: Sequence[Sample], image_id: int) -> list[NDArray[np.bool_]]:
    """For each sample, which of its tokens are image tokens."""
    return [np.array(sample.ids) == image_id for sample in samples]


def run_block(
    graph: Graph,
    block: Block,
    feeds: Sequence[Feeds],
    states: Sequence[Values],
    threads: int,
    taps: Sequence[str] = (),
    seen: Callable[[int, Values], None] | None = None,
) -> list[Values]:
    """Run one block over all samples; `seen` is given the values named in `taps`, sample by sample. Returns the
    outputs' values.
    """
    wanted = [*block.outputs, *(t for t in dict.fromkeys(taps) if t not in block.outputs)]
    session = graph.part(wanted, block.cut).session(threads)
    names = {i.name for i in session.get_inputs()}
    after = []
    for i, (given, state) in enumerate(zip(feeds, states, strict=True)):
        values = dict(
            zip(wanted, session.run(wanted, {n: v for n, v in {**given, **state}.items() if n in names}), strict=True)
        )
        if seen:
            seen(i, {**state, **values})
        after.append({name: values[name] for name in block.outputs})
    return after
