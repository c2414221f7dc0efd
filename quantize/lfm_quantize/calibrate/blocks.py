"""A graph as a row of blocks (one transformer layer each), run one at a time over all samples.

One block's weights are in memory at a time; between blocks stand only the samples' hidden states. That is what makes a
model larger than memory's share quantizable, and a killed run resumable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lfm_quantize.calibrate.samples import Sample
from lfm_quantize.graph import linears, nodes_between, part, release, session
from lfm_quantize.passes.attention import attentions
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.rounding import Rounded

Feeds = dict[str, NDArray[Any]]
Values = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Block:
    """Part of a graph between two cuts."""

    name: str
    cut: tuple[str, ...]  # values it starts from
    outputs: tuple[str, ...]  # values the next one starts from
    linears: tuple[str, ...]
    attentions: tuple[str, ...] = ()


_VISION = ("vision.embeddings", "vision.encoder.layers.{}.layer_norm1", "vision.post_layernorm")
_TEXT = ("text.embeddings", "text.layers.{}.operator_norm", "text.embedding_norm")
"""What comes before the first layer, the norm that each layer begins with, the last norm."""


def has_blocks(model: ir.Model) -> bool:
    """Whether lfm-edge export built this encoder or decoder, so that its layers are known by name."""
    return not {_VISION[-1], _TEXT[-1]}.isdisjoint(n.name for n in model.graph)


def blocks_of(model: ir.Model) -> list[Block]:
    """The blocks of a vision encoder or decoder graph, in order; a block ends where the next layer's norm begins."""
    nodes = {n.name: n for n in model.graph}
    vision = _VISION[-1] in nodes
    first, norm, last = _VISION if vision else _TEXT
    count = next(i for i in range(10_000) if norm.format(i) not in nodes)
    names = [norm.format(i) for i in range(count)] + [last]
    cuts = [_residual(nodes[name]) for name in names]
    ends = [*cuts, (str(model.graph.outputs[0].name),)]
    starts = [(), *cuts]
    labels = [first, *(name.rsplit(".", 1)[0] for name in names[:-1]), "projector" if vision else "head"]
    blocks = []
    for label, cut, outputs in zip(labels, starts, ends, strict=True):
        inside = nodes_between(model, outputs, cut)
        if inside:
            blocks.append(Block(label, cut, outputs, tuple(linears(model, inside)), tuple(attentions(model, inside))))
    return blocks


def _residual(norm: ir.Node) -> tuple[str, ...]:
    """What a norm normalises: one value, or two that it adds."""
    taken = norm.inputs[: 2 if norm.op_type.startswith("Skip") else 1]
    return tuple(str(value.name) for value in taken if value is not None)


@dataclass(frozen=True)
class FedGraph:
    """A graph and what it is fed: the inputs of each sample, and which of its tokens are image tokens; of some samples,
    their numbers in the whole run.
    """

    model: ir.Model
    feeds: Sequence[Feeds]
    kinds: Sequence[NDArray[np.bool_]]
    threads: int
    numbers: Sequence[tuple[int, int]] = ()
    of: int = 0  # samples in the whole run

    def start(self) -> list[Values]:
        """Each sample's hidden state before the first block: there is none yet."""
        return [{} for _ in self.feeds]

    def rewritten(self, *passes: ir.passes.PassBase) -> FedGraph:
        """A changed copy of the graph, fed the same."""
        return replace(self, model=rewritten(self.model, *passes))

    def run(
        self,
        block: Block,
        states: Sequence[Values],
        taps: Sequence[str] = (),
        seen: Callable[[int, Values], None] | None = None,
    ) -> list[Values]:
        """Run one block over all samples; returns the outputs' values.

        Args:
            block: of this graph.
            states: each sample's hidden state before the block.
            taps: values inside the block that `seen` is given besides.
            seen: called with each sample's number and its values.
        """
        wanted = [*block.outputs, *(t for t in dict.fromkeys(taps) if t not in block.outputs)]
        running = session(part(self.model, wanted, block.cut, next(iter(states), {})), self.threads)
        names = {i.name for i in running.get_inputs()}
        after = []
        for i, (given, state) in enumerate(zip(self.feeds, states, strict=True)):
            taken = {n: v for n, v in {**given, **state}.items() if n in names}
            values = dict(zip(wanted, running.run(wanted, taken), strict=True))
            if seen:
                seen(i, {**state, **values})
            after.append({name: values[name] for name in block.outputs})
        return after

    def release(self) -> None:
        """Give back the memory of weights that were read."""
        release(self.model)


def decoder_feeds(model: ir.Model, embeds: NDArray[np.float32]) -> Feeds:
    """Inputs for a whole prompt [1, S, H] at once, no past."""
    feeds: Feeds = {"inputs_embeds": embeds, "attention_mask": np.ones(embeds.shape[:2], np.int64)}
    for value in model.graph.inputs:
        if str(value.name).startswith("past_"):
            assert value.shape is not None
            assert value.dtype is not None
            shape = [d if isinstance(d, int) else int(i == 0) for i, d in enumerate(value.shape)]
            feeds[str(value.name)] = np.zeros(shape, value.dtype.numpy())
    return feeds


def prompt_feeds(
    model: ir.Model,
    samples: Sequence[Sample],
    kinds: Sequence[NDArray[np.bool_]],
    table: NDArray[np.float32] | Rounded,
    features: Sequence[NDArray[np.float32]],
) -> list[Feeds]:
    """The decoder's inputs for each sample: rows of the embedding table [V, H], rounded or not; image features where
    `kinds` says image token.
    """
    found = []
    for sample, is_image, image in zip(samples, kinds, features, strict=True):
        embeds = table[np.array(sample.ids)][None].astype(np.float32)
        embeds[0, is_image] = image
        found.append(decoder_feeds(model, embeds))
    return found


def image_positions(samples: Sequence[Sample], image_id: int) -> list[NDArray[np.bool_]]:
    """For each sample, which of its tokens are image tokens."""
    return [np.array(sample.ids) == image_id for sample in samples]
