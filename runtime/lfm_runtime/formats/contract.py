"""The graphs' contract: file stems, input and output names, state shapes. Export writes from it, the runtime checks by
it.

H hidden, V vocabulary, B batch, S new tokens, P past tokens, n image views, p patches. The names are the hub's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from lfm_profiles import VARIANTS, Variant
from lfm_profiles.variants import Number

from lfm_runtime.errors import GraphContractError

LayerKind = Literal["conv", "full_attention"]

SCHEMA_VERSION = 1
"""Of manifest.json and prompt.json. A reader refuses newer ones."""

MAX_CONTEXT = 32768
"""LFM2-VL's documented context. config.json's 128,000 positions would cost 32 MB of rotary tables in memory."""

MANY_TOKENS = 16
"""A decoder of ours gives logits for every position of a step of fewer tokens, of the last position alone from here on.
"""

BATCH, TOKENS, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
PATCHES, IMAGE_TOKENS = "num_patches", "num_image_tokens"
"""What free axes are called: as on the hub, since transformers.js makes its first cache by these names."""

POSITIONS = "positions"
"""What the logits' second axis is called in such a decoder."""

CONV_INPUT = "conv_input."
"""Outputs of a decoder of ours, by layer: f32 [B, S, H], what a convolution has read of the step's tokens. With the
state before the step, they make its state after any of the tokens. The hub's contract does not know them, so their
names must not look like states'; whoever does not ask for them pays nothing.
"""

TOP_LOGITS, TOP_IDS, NEXT_MASK = "top_logits", "top_ids", "next_attention_mask"
"""Outputs of a decoder of ours for GPUs, so that nothing of the vocabulary's size or the context's crosses to the host
at each token: f32 and i64 [B, 1 or S, TOP_TOKENS], the likeliest tokens in order; i64 [B, P + S], the mask given,
right-padded, with one token more.
"""

TOP_TOKENS = 64
"""That a step gives out. Where it cannot be told from them what all the logits would tell, all are read: see
sampling.Top.
"""

NUM_LOGITS = "num_logits_to_keep"
"""An input of some published decoders: how many of the last positions' logits are wanted. A scalar, or a list of
one."""

KV_SCALES = "kv_scales"
"""In the metadata of a decoder whose past is int8: a hash of its scales. Two decoders share a past only with the same
scales.
"""


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its file stem, the names other tools use for it, and the names the runtime binds."""

    stem: str
    aliases: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    optional_inputs: tuple[str, ...] = ()
    output_aliases: tuple[str, ...] = ()  # of the first output

    def output(self, outputs: Sequence[str]) -> str | None:
        """The first output's name in a graph with these outputs: ours, another's, or that of the only one."""
        known = (self.outputs[0], *self.output_aliases)
        only = outputs[0] if len(outputs) == 1 else None
        return next((name for name in known if name in outputs), only)

    def check(self, path: object, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        """Raise GraphContractError when a name is missing, or an input is left that nobody would feed."""
        found_inputs = set(inputs)
        missing = set(self.inputs) - found_inputs
        if self.output(list(outputs)) is None:
            missing.add(self.outputs[0])
        unknown = {name for name in found_inputs - set(self.inputs) - set(self.optional_inputs) if not is_past(name)}
        if missing or unknown:
            parts = [f"lacks {', '.join(sorted(missing))}"] if missing else []
            parts += [f"wants unknown inputs {', '.join(sorted(unknown))}"] if unknown else []
            raise GraphContractError(f"{path}: not a {self.stem} graph: it {' and '.join(parts)}; export it again")


VISION_ENCODER = GraphSpec(
    "vision_encoder",
    ("vision_encoder", "embed_images"),
    ("pixel_values", "pixel_attention_mask", "spatial_shapes"),  # f32 [n, p, 768], i64 [n, p], i64 [n, 2] rows × cols
    ("image_features",),  # f32 [image tokens of all views, H]
    output_aliases=("image_embeddings", "image_embeds"),
)
EMBED_TOKENS = GraphSpec(
    "embed_tokens", ("embed_tokens",), ("input_ids",), ("inputs_embeds",), ("image_features",)
)  # i64 [B, S] → f32 [B, S, H]; onnxruntime-genai's puts image features [n, H] in as well
DECODER = GraphSpec(
    "decoder_model_merged",
    ("decoder_model_merged", "decoder", "decoder_model"),
    ("inputs_embeds", "attention_mask"),  # f32 [B, S, H], i64 [B, P + S]
    ("logits",),  # f32 [B, 1 or S, V]
    ("position_ids", NUM_LOGITS),
)
GRAPHS = (VISION_ENCODER, EMBED_TOKENS, DECODER)


def past_names(layers: Iterable[LayerKind]) -> list[str]:
    """State inputs in layer order. conv: f32 [B, H, kernel]; key and value: f32 [B, kv heads, P, head dim]."""
    names: list[str] = []
    for i, kind in enumerate(layers):
        names += [f"past_conv.{i}"] if kind == "conv" else [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
    return names


def is_past(name: str) -> bool:
    """Whether an input is a state: by the hub's names, or onnxruntime-genai's."""
    return is_conv(name) or name.startswith("past_key_values.")


def is_conv(past: str) -> bool:
    """Whether a state is a convolution's: past_conv.0, or past.0.conv in decoders of onnxruntime-genai."""
    return past.startswith("past_conv.") or re.fullmatch(r"past\.\d+\.conv", past) is not None


def present_name(past: str) -> str:
    """The output that carries a state input on: past_conv.0 → present_conv.0, past_key_values.2.key → present.2.key,
    past.0.conv → present.0.conv.
    """
    if not past.startswith(("past_key_values.", "past_conv.")):
        return past.replace("past.", "present.", 1)
    return past.replace("past_key_values.", "present.").replace("past_conv.", "present_conv.")


def graph_file(stem: str, variant: str) -> str:
    """Return the path of a variant's graph, relative to the bundle."""
    return f"onnx/{stem}{VARIANTS[variant].suffix}.onnx"


def variant_of(path: PurePath, graph: GraphSpec) -> Variant | None:
    """The variant whose own file this is: a variant can take a graph of another. None for a name that none has."""
    return next((v for v in VARIANTS.values() for a in graph.aliases for s in v.suffixes if path.stem == a + s), None)


def number_of(graph: GraphSpec, path: PurePath) -> Number:
    """What a graph's weights are, as the row of the variant says whose file it is."""
    row = variant_of(path, graph) or VARIANTS["fp32"]
    return row.vision if graph is VISION_ENCODER else row.weights
