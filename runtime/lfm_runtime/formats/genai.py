"""genai_config.json, in folders made for onnxruntime-genai: which files are the graphs, and the model's sizes, which
such folders need not say in a config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lfm_runtime.errors import BundleError
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, VISION_ENCODER
from lfm_runtime.formats.files import damage_is, read_json_object
from lfm_runtime.formats.manifest import ModelFacts
from lfm_runtime.formats.onnx_file import operators

NAME = "genai_config.json"
_PARTS = {DECODER.stem: "decoder", VISION_ENCODER.stem: "vision", EMBED_TOKENS.stem: "embedding"}
_TYPES = ("lfm2_vl",)
_EIGHT_BITS = frozenset({"DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat"})


@dataclass(frozen=True)
class Genai:
    """What a folder's genai_config.json says of its model."""

    graphs: dict[str, Path]  # stem → file
    facts: ModelFacts
    eos: list[int]

    @property
    def variant(self) -> str:
        """The variant whose numbers the decoder has, by the kind of its products."""
        found = operators(self.graphs[DECODER.stem])
        return "int4" if "MatMulNBits" in found else "int8" if _EIGHT_BITS.intersection(found) else "fp32"

    @staticmethod
    def read(folder: Path) -> Genai | None:
        """Read a folder's file; None where it has none.

        Raises:
            BundleError: it is damaged, of another model, or names a graph that is not there.
        """
        path = folder / NAME
        if not path.exists():
            return None
        with damage_is(BundleError, path, "copy the folder again"):
            model = read_json_object(path, BundleError)["model"]
            if model.get("type") not in _TYPES:
                raise BundleError(f"{path}: model.type is {str(model.get('type'))[:40]!r}; lfm-edge runs {_TYPES[0]}")
            graphs = {stem: _graph(folder, path, model, part) for stem, part in _PARTS.items()}
            decoder, eos = model["decoder"], model["eos_token_id"]
            layers = tuple(decoder["layer_types"])
            if not set(layers) <= {"conv", "full_attention"}:
                raise BundleError(f"{path}: model.decoder.layer_types has unknown kinds; update lfm-edge")
            facts = ModelFacts(
                layers,
                int(decoder["hidden_size"]),
                int(decoder["num_key_value_heads"]),
                int(decoder["head_size"]),
                int(decoder.get("conv_cache_size", 2)),
                int(model["vocab_size"]),
                int(model["context_length"]),
                0,
            )
            return Genai(graphs, facts, [int(i) for i in (eos if isinstance(eos, list) else [eos])])


def _graph(folder: Path, path: Path, model: dict[str, Any], part: str) -> Path:
    name = str((model.get(part) or {}).get("filename") or "")
    place = PurePosixPath(name)
    if not name or place.is_absolute() or ".." in place.parts:
        raise BundleError(f"{path} names no graph for model.{part}; lfm-edge needs decoder, vision and embedding")
    if not (folder / name).is_file():
        raise BundleError(f"{folder / name} is missing, and {NAME} names it; copy the folder again")
    return folder / name
