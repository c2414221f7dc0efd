"""The graphs that quantizing starts from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from lfm_profiles import FINEST, VARIANTS
from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import command
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, NEXT_MASK, TOP_IDS, TOP_LOGITS, VISION_ENCODER
from numpy.typing import NDArray

from lfm_quantize.graph import Linear, QuantizeError, constant, linears, open_graph, release
from lfm_quantize.passes.attention import attentions
from lfm_quantize.passes.nodes import drop_unused
from lfm_quantize.passes.table import look_up
from lfm_quantize.passes.widen import Widen

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """The graphs to start from, in fp32. Passes change copies of them."""

    variant: str  # whose graphs they are: fp32, or fp16 where there is no fp32
    vision: ir.Model
    embed: ir.Model
    decoder: ir.Model
    table: Float  # [V, H]
    tied: bool

    @staticmethod
    def open(bundle: Bundle, asked: str) -> Source:
        """Open a bundle's finest graphs.

        Args:
            bundle: where they are.
            asked: the variant to make. Graphs of lfm-edge export --portable do for int8-static, which changes the
                encoder alone.

        Raises:
            QuantizeError: it has neither fp32 nor fp16 graphs, or nothing finer than `asked`, or portable graphs that
                do not do.
        """
        variant = next((v for v in FINEST if v in bundle.variants), None)
        if variant is None:
            how = command("export", "CHECKPOINT", "-o", bundle.folder)
            raise QuantizeError(f"{bundle.folder} has neither fp32 nor fp16 weights to start from; add them: {how}")
        if variant == asked:
            raise QuantizeError(f"{bundle.folder} has {asked} from lfm-edge export and nothing finer to make it from")
        files = bundle.graphs(variant)[1]
        vision, embed, decoder = (
            Widen()(open_graph(files[g.stem])).model for g in (VISION_ENCODER, EMBED_TOKENS, DECODER)
        )
        head = linears(decoder).get("head")
        if head is None and not VARIANTS[asked].static:
            raise QuantizeError(
                f"{files[DECODER.stem]} is a portable graph, from which quantize can make only int8-static; for "
                f"{asked} export the checkpoint without --portable"
            )
        for value in [v for v in decoder.graph.outputs if v.name in (TOP_LOGITS, TOP_IDS, NEXT_MASK)]:
            decoder.graph.outputs.remove(value)
        drop_unused(decoder.graph)
        table: Float = constant(look_up(embed).inputs[0])
        weights = constant(head.weight) if head else None
        tied = weights is not None and weights.shape == table.shape and np.array_equal(weights, table)
        for model in (embed, decoder):
            release(model)
        return Source(variant, vision, embed, decoder, table, tied)

    def linears(self) -> dict[str, Linear]:
        """All matrix products with constant weights, by name, the encoder's first."""
        return {**linears(self.vision), **linears(self.decoder)}

    def layers(self) -> list[str]:
        """What a recipe can name: all matrix products with constant weights, and the encoder's attentions."""
        return [*self.linears(), *attentions(self.vision)]

    @property
    def head(self) -> str:
        """Name of the head's weights."""
        return str(linears(self.decoder)["head"].weight.name)

    def other_bytes(self) -> int:
        """What of the files is no product's weight: norms, biases, the position table (kept as fp16), nodes."""
        total = 0
        for model in (self.vision, self.embed, self.decoder):
            weights = {str(linear.weight.name) for linear in linears(model).values()}
            if model is self.embed:
                weights.add(str(look_up(model).inputs[0].name))  # type: ignore[union-attr]
            for name, value in model.graph.initializers.items():
                if name not in weights and value.const_value is not None:
                    total += 4 * value.const_value.size // (2 if "position_embedding" in name else 1) + 60
            total += sum(ir.to_proto(n).ByteSize() for n in model.graph)
        return total
