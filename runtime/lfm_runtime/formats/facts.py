"""Sizes of the model as config.json tells them, and whether what a manifest says agrees with it and with itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lfm_runtime.errors import BundleError
from lfm_runtime.formats.contract import DECODER, MAX_CONTEXT, past_names
from lfm_runtime.formats.files import damage_is, read_json_object
from lfm_runtime.formats.manifest import MANIFEST, Manifest, ModelFacts


def context_length(config: Mapping[str, Any]) -> int:
    """Positions that a config.json allows, LFM2-VL's documented context at most; raises ValueError below one."""
    said = (config.get("text_config") or {}).get("max_position_embeddings")
    found = MAX_CONTEXT if said is None else min(int(said), MAX_CONTEXT)
    if found < 1:
        raise ValueError(f"text_config.max_position_embeddings is {said}, 1 or more is needed")
    return found


def facts_of(text: Any, context: int) -> ModelFacts:
    """Of a text_config, in the spellings that releases have; raises KeyError, TypeError or ValueError where it does not
    tell them.
    """
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    attention = text.get("full_attn_idxs") or []
    kinds = text.get("layer_types") or [
        "full_attention" if n in attention else "conv" for n in range(text["num_hidden_layers"])
    ]
    kv_heads, head_dim = int(text["num_key_value_heads"]), int(text.get("head_dim") or hidden // heads)
    kernel, vocabulary = int(text.get("conv_L_cache", 3)), int(text["vocab_size"])
    return ModelFacts(tuple(kinds), hidden, kv_heads, head_dim, kernel, vocabulary, context, 0)


def contradictions(folder: Path, manifest: Manifest, image_token_id: int) -> Iterator[str]:
    """What the manifest says of the model that config.json, the tokenizer or its own graphs say differently.

    Args:
        folder: the bundle.
        manifest: its manifest.
        image_token_id: the tokenizer's id of the image token.

    Raises:
        BundleError: config.json is damaged.
    """
    path = folder / "config.json"
    config = read_json_object(path, BundleError)
    with damage_is(BundleError, path, "copy it from the checkpoint again"):
        context = context_length(config)
    try:
        told = facts_of(config.get("text_config"), context)
    except (KeyError, TypeError, ValueError, AttributeError):
        told = manifest.model  # a config.json that leaves sizes to transformers' defaults tells nothing
    for key in ("layers", "hidden", "kv_heads", "head_dim", "conv_kernel", "vocabulary", "context_length"):
        ours, theirs = getattr(manifest.model, key), context if key == "context_length" else getattr(told, key)
        if ours != theirs:
            yield f"{MANIFEST}: model.{key} is {_short(ours)}, config.json says {_short(theirs)}; {_AGAIN}"
    if manifest.model.image_token_id != image_token_id:
        yield (
            f"{MANIFEST}: model.image_token_id is {manifest.model.image_token_id}, the tokenizer's is "
            f"{image_token_id}; {_AGAIN}"
        )
    oldest = min((entry.min_onnxruntime for entry in manifest.graphs.values()), key=_version, default=None)
    if oldest and _version(manifest.min_onnxruntime) > _version(oldest):
        yield f"{MANIFEST}: min_onnxruntime is {manifest.min_onnxruntime}, a graph says {oldest}; {_AGAIN}"
    wanted = set(past_names(manifest.model.layers))
    for name in sorted({graphs[DECODER.stem] for graphs in manifest.variants.values() if DECODER.stem in graphs}):
        entry = manifest.graphs.get(name)
        if entry and (states := {n for n in entry.inputs if n.startswith("past_")}) != wanted:
            odd = min(states ^ wanted)
            yield f"{MANIFEST}: the inputs of {name} are not those of model.layers ({odd}); {_AGAIN}"


_AGAIN = "copy or export the bundle again"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _short(value: Any) -> str:
    """A value as a message shows it: of layers, how many, and where attention is."""
    if not isinstance(value, tuple):
        return str(value)
    attention = ", ".join(str(n) for n, kind in enumerate(value) if kind == "full_attention")
    return f"{len(value)} layers with attention at {attention or 'none'}"
