"""Tiny checkpoints of which something was changed, and what their bundles compute."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import reference
from safetensors.torch import load_file, save_file

MISSING = "missing"
Q = "model.language_model.layers.1.self_attn.q_proj.weight"
CONV = "model.language_model.layers.0.conv.conv.weight"
TABLE = "model.language_model.embed_tokens.weight"


def edit(folder: Path, name: str, *path: str, to: object) -> None:
    """Set or (MISSING) drop one value of a JSON file."""
    raw = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    inner = raw
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    if to is MISSING:
        inner.pop(path[-1], None)
    else:
        inner[path[-1]] = to
    (folder / name).write_text(json.dumps(raw))


def tensors(folder: Path, **changes: object) -> None:
    """Add, change or (None) drop tensors; names with _ for the dots' sake are given as they are."""
    found = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def logits_of(bundle: Path, ids: list[int]) -> np.ndarray:
    import onnxruntime as ort

    embed, decoder = (
        ort.InferenceSession(bundle / "onnx" / f"{stem}.onnx") for stem in ("embed_tokens", "decoder_model_merged")
    )
    return reference.decode(decoder, embed.run(None, {"input_ids": np.array([ids])})[0], [len(ids)])


def features_of(bundle: Path, pixels, grids, mask) -> np.ndarray:
    import onnxruntime as ort

    vision = ort.InferenceSession(bundle / "onnx" / "vision_encoder.onnx")
    return vision.run(None, {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids})[0]
