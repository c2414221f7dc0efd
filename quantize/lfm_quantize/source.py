"""The graphs that quantizing starts from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from lfm_profiles import FINEST
from lfm_runtime.bundle import Bundle
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, NEXT_MASK, TOP_IDS, TOP_LOGITS, VISION_ENCODER
from numpy.typing import NDArray

from lfm_quantize.graph import Graph, QuantizeError

Float = NDArray[np.float32]


@dataclass
class Source:
    """The graphs to start from, taken apart."""

    vision: Graph
    embed: Graph
    decoder: Graph
    table: Float  # [V, H]
    tied: bool

    @staticmethod
    def open(bundle: Bundle) -> tuple[str, Source]:
        """(variant, its graphs): fp32, or fp16 where there is no fp32."""
        variant = next((v for v in FINEST if v in bundle.variants), None)
        if variant is None:
            raise QuantizeError(
                f"{bundle.folder} has neither fp32 nor fp16 weights to start from; add them with: lfm-edge export"
            )
        files = bundle.graphs(variant)[1]
        vision, embed, decoder = (Graph.open(files[g.stem]) for g in (VISION_ENCODER, EMBED_TOKENS, DECODER))
        gather = look_up(embed)
        table: Float = embed.tensors[gather.input[0]].array
        if "head" not in decoder.linears():
            how = (
                "quantize needs those that export builds without --portable; for fixed ranges see "
                "scripts/shape_static.py --int8"
            )
            raise QuantizeError(f"{files[DECODER.stem]} is a portable graph; {how}")
        head = decoder.tensors[decoder.linears()["head"].weight].array
        decoder = decoder.part([o.name for o in decoder.outputs if o.name not in (TOP_LOGITS, TOP_IDS, NEXT_MASK)])
        tied = head.shape == table.shape and np.array_equal(head, table)
        for graph in (embed, decoder):
            graph.release()
        return variant, Source(vision, embed, decoder, table, tied)

    def linears(self) -> list[str]:
        """Names of all matrix products with constant weights, the encoder's first."""
        return [*self.vision.linears(), *self.decoder.linears()]

    @property
    def head(self) -> str:
        """Name of the head's weights."""
        return self.decoder.linears()["head"].weight

    def other_bytes(self) -> int:
        """What of the files is no product's weight: norms, biases, the position table (kept as fp16), nodes."""
        total = 0
        for graph in (self.vision, self.embed, self.decoder):
            weights = {linear.weight for linear in graph.linears().values()}
            if graph is self.embed:
                weights.add(look_up(graph).input[0])
            for name, tensor in graph.tensors.items():
                if name not in weights:
                    total += 4 * int(np.prod(tensor.shape)) // (2 if "position_embedding" in name else 1) + 60
            total += sum(node.ByteSize() for node in graph.nodes)
        return total


def look_up(embed: Graph) -> onnx.NodeProto:
    """The node that takes rows out of the embedding table."""
    return next(node for node in embed.nodes if node.op_type == "Gather")
