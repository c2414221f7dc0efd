"""The variants of a bundle: which numbers its weights, activations, keys and values are. One row each.

Nothing else is known of a variant by its name: a new one is a row here, and what makes it (export or quantize).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Number = Literal["fp32", "fp16", "int8", "int4"]

_EXACT, _HALF, _ROUNDED = (0.001, 0.001), (0.01, 0.02), (0.02, 0.1)
"""Tolerances. Right kernels (VNNI, AVX2, SSE, weights packed or not) were 0.010 apart at most in features and 0.042 in
logits, fp32's 2e-6; int8 products that overflow were 0.052 off in features: docs/performance.md.
"""


@dataclass(frozen=True)
class Variant:
    """One variant: its numbers, graph files, tolerances and bases."""

    name: str
    suffixes: tuple[str, ...]  # of its graph files: ours, then those that other publishers write
    weights: Number  # of the decoder's matrix products
    vision: Number  # of the vision encoder's
    tolerance: tuple[float, float]
    """Between two machines, of (image features, logits): root mean square of the difference against that of the
    values, logits taken around their mean.
    """
    floor: float  # highest KL divergence to fp32 that quantize lets pass, nats a token
    activations: Literal["fp32", "fp16"] = "fp32"  # between operators
    keys: Literal["float", "int8"] = "float"  # keys and values that the decoder remembers
    bases: tuple[str, ...] = ()  # its graphs are over the weights' files of these variants
    static: bool = False  # the encoder's activation ranges are fixed
    for_gpu: bool = False
    """Made for GPUs alone. A processor computes it all the same, unprepared: int4-fp16 becomes NaN in what onnxruntime
    1.31 saves.
    """

    @property
    def suffix(self) -> str:
        """Suffix of the graph files that lfm-edge writes."""
        return self.suffixes[0]

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes the whole of it: attention in fp32 is left to the CPU."""
        return self.activations == "fp16"

    @property
    def needs_images(self) -> bool:
        """Whether it cannot be made without calibration images: its ranges are theirs."""
        return self.static or self.keys == "int8"

    @property
    def float_keys(self) -> str:
        """The variant with the same weights whose keys and values are floats."""
        return self.bases[0] if self.keys == "int8" else self.name

    @property
    def int8_keys(self) -> str | None:
        """The variant with the same weights whose keys and values are int8; None where there is none."""
        if self.keys == "int8":
            return self.name
        return next((v.name for v in VARIANTS.values() if v.keys == "int8" and v.bases == (self.name,)), None)

    @property
    def dependents(self) -> list[str]:
        """Names of the variants whose graphs use the weights' files of this one."""
        return [v.name for v in VARIANTS.values() if self.name in v.bases]

    def has_decoder_of(self, other: Variant) -> bool:
        """Whether both decoders compute the same products, so that none is faster with prompts."""
        return (self.weights, self.activations) == (other.weights, other.activations)

    def shares_states_with(self, other: Variant) -> bool:
        """Whether each variant's decoder can go on from the other's states."""
        return (self.keys, self.activations) == (other.keys, other.activations)


VARIANTS = {
    v.name: v
    for v in (
        Variant("fp32", ("",), "fp32", "fp32", _EXACT, 0.0),
        Variant("fp16", ("_fp16",), "fp16", "fp16", _HALF, 0.001, "fp16"),
        Variant("int8", ("_int8", "_q8", "_quantized", "_uint8"), "int8", "int8", _ROUNDED, 0.01),
        Variant("int4", ("_q4",), "int4", "int8", _ROUNDED, 0.1),
        Variant("int8-static", ("_int8_static",), "int8", "int8", _ROUNDED, 0.01, static=True),
        Variant("int8-kv8", ("_int8_kv8",), "int8", "int8", _ROUNDED, 0.01, keys="int8", bases=("int8",)),
        Variant("int4-kv8", ("_q4_kv8",), "int4", "int8", _ROUNDED, 0.1, keys="int8", bases=("int4",)),
        Variant("int4-fp16", ("_q4f16",), "int4", "fp16", _ROUNDED, 0.1, "fp16", bases=("int4", "fp16"), for_gpu=True),
        Variant("fp16-trt", ("_fp16_trt",), "fp16", "fp16", _HALF, 0.001, "fp16", bases=("fp16",), for_gpu=True),
    )
}
"""By name, in the order in which a hub repository's files are looked for."""
FINEST = ("fp32", "fp16")
"""What export writes: every other variant is made of the first of these that is there."""
SMALLER = tuple(v.name for v in VARIANTS.values() if v.weights in ("int8", "int4") and not v.bases and not v.static)
"""Those for CPUs that take less memory, the larger first."""
