"""Every tensor of a checkpoint, by its place in the architecture: all are used, known to be left over, or named in an
error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from lfm_export.checkpoint.config import CheckpointError, Config, quantized
from lfm_export.checkpoint.tensors import Entry

Shape = tuple[int, ...]

LEFT_OVER = re.compile(
    r"(?:model\.)?vision_tower\.(?:vision_model\.)?head\..+"  # SigLIP2's pooling head: LFM2-VL reads the patches
    r"|.+\.(?:rotary_emb|pos_emb)\.inv_freq|.+\.position_ids"  # computed, and saved by older releases
)


def places(config: Config) -> dict[str, Shape]:
    """Place (`text.layers.0.ffn_norm.weight`, `head` …) → shape of all that the architecture has."""
    return dict([*_vision(config), *_projector(config), *_text(config)])


def _linear(place: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{place}.weight", (rows, columns)
    if bias:
        yield f"{place}.bias", (rows,)


def _layer_norm(place: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{place}.weight", (width,)
    yield f"{place}.bias", (width,)


def _vision(config: Config) -> Iterator[tuple[str, Shape]]:
    vision = config.vision
    hidden = vision.hidden
    yield from _linear("vision.embeddings.patch_embedding", hidden, vision.patch**2 * vision.channels, bias=True)
    yield "vision.embeddings.position_embedding.weight", (vision.table_side**2, hidden)
    for i in range(vision.layers):
        place = f"vision.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{place}.self_attn.{name}", hidden, hidden, bias=True)
        yield from _linear(f"{place}.mlp.fc1", vision.feed_forward, hidden, bias=True)
        yield from _linear(f"{place}.mlp.fc2", hidden, vision.feed_forward, bias=True)
        yield from _layer_norm(f"{place}.layer_norm1", hidden)
        yield from _layer_norm(f"{place}.layer_norm2", hidden)
    yield from _layer_norm("vision.post_layernorm", hidden)


def _projector(config: Config) -> Iterator[tuple[str, Shape]]:
    projector = config.projector
    width = config.vision.hidden * projector.factor**2
    if projector.layernorm:
        yield from _layer_norm("projector.layer_norm", width)
    yield from _linear("projector.linear_1", projector.hidden, width, projector.bias)
    yield from _linear("projector.linear_2", config.text.hidden, projector.hidden, projector.bias)


def _text(config: Config) -> Iterator[tuple[str, Shape]]:
    text = config.text
    hidden, heads, kv = text.hidden, text.heads * text.head_dim, text.kv_heads * text.head_dim
    yield "text.embed_tokens.weight", (text.vocabulary, hidden)
    for i, kind in enumerate(text.layers):
        place = f"text.layers.{i}"
        if kind == "conv":
            yield from _linear(f"{place}.conv.in_proj", 3 * hidden, hidden, text.conv_bias)
            yield f"{place}.conv.conv.weight", (hidden, 1, text.kernel)
            if text.conv_bias:
                yield f"{place}.conv.conv.bias", (hidden,)
            yield from _linear(f"{place}.conv.out_proj", hidden, hidden, text.conv_bias)
        else:
            for name, rows in (("q_proj", heads), ("k_proj", kv), ("v_proj", kv)):
                yield f"{place}.self_attn.{name}.weight", (rows, hidden)
            yield f"{place}.self_attn.out_proj.weight", (hidden, heads)
            yield f"{place}.self_attn.q_layernorm.weight", (text.head_dim,)
            yield f"{place}.self_attn.k_layernorm.weight", (text.head_dim,)
        yield f"{place}.feed_forward.w1.weight", (text.feed_forward, hidden)
        yield f"{place}.feed_forward.w3.weight", (text.feed_forward, hidden)
        yield f"{place}.feed_forward.w2.weight", (hidden, text.feed_forward)
        yield f"{place}.operator_norm.weight", (hidden,)
        yield f"{place}.ffn_norm.weight", (hidden,)
    yield "text.embedding_norm.weight", (hidden,)
    if not text.tied_head:
        yield "head", (text.vocabulary, hidden)


def check_origin(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Refuse checkpoints that another tool has changed, by its traces in tensors' names and types.

    Raises:
        CheckpointError: names the tool and what to do.
    """
    names = entries.keys()
    traces = (
        ("MLX", lambda n: n.endswith(".scales")),
        ("GPTQ or AWQ", lambda n: n.endswith((".qweight", ".qzeros", ".g_idx"))),
        ("bitsandbytes", lambda n: n.endswith((".absmax", ".SCB")) or ".quant_state." in n or ".quant_map" in n),
        ("fp8", lambda n: n.endswith((".weight_scale", ".weight_scale_inv", ".input_scale"))),
        (
            "another tool",
            lambda n: entries[n].dtype in ("I8", "U8", "I32", "U32", "F8_E4M3", "F8_E5M2") and n.endswith("weight"),
        ),
    )
    for tool, is_trace in traces:
        if any(map(is_trace, names)):
            raise quantized(folder, tool)
    first = next(iter(names), "")
    if first.startswith("_orig_mod.") or "._orig_mod." in first:
        raise CheckpointError(
            f"{folder}: tensor names begin with _orig_mod., as torch.compile has them; save the model that was "
            "compiled: "
            "model._orig_mod.save_pretrained(…)"
        )
    if first.startswith("module."):
        raise CheckpointError(
            f"{folder}: tensor names begin with module., as DataParallel has them; save the model inside: "
            "model.module.save_pretrained(…)"
        )
    if first.startswith("base_model.model."):
        raise CheckpointError(
            f"{folder}: tensor names begin with base_model.model., as PEFT has them; save merged weights: "
            "model.merge_and_unload().save_pretrained(…), or export the base model with --adapter"
        )


def check_tensors(folder: Path, entries: Mapping[str, Entry], name_of: Mapping[str, str], config: Config) -> None:
    """Hold a checkpoint's tensors against the architecture. `name_of`: place → name in the file.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or would be dropped.
    """
    for place, shape in places(config).items():
        name = name_of[place]
        found = entries.get(name)
        if found is None:
            raise CheckpointError(
                f"{folder}: tensor {name} is missing from the checkpoint; download it again, or correct config.json"
            )
        if found.shape != shape:
            if place.endswith("conv.conv.weight") and found.shape == (shape[0], shape[2], shape[1]):
                raise CheckpointError(
                    f"{folder}: convolutions are {list(found.shape)} instead of {list(shape)}, as MLX has them; "
                    "export the original"
                )
            raise CheckpointError(
                f"{found.file}: tensor {name} has shape {list(found.shape)}, config.json asks for {list(shape)}; "
                "correct config.json"
            )
    unknown = sorted(entries.keys() - set(name_of.values()) - {name for name in entries if LEFT_OVER.fullmatch(name)})
    if not unknown:
        return
    layers = {"text": len(config.text.layers), "vision": config.vision.layers}
    for part, key in (("text", "text_config"), ("vision", "vision_config")):
        prefix = (
            name_of["text.embed_tokens.weight"].removesuffix("embed_tokens.weight")
            if part == "text"
            else (name_of["vision.post_layernorm.weight"].removesuffix("post_layernorm.weight") + "encoder.")
        )
        numbers = [
            int(number) for name in unknown for number in re.findall(f"^{re.escape(prefix)}layers\\.(\\d+)\\.", name)
        ]
        if numbers and max(numbers) >= layers[part]:
            raise CheckpointError(
                f"{folder}: {key}.num_hidden_layers is {layers[part]}, the checkpoint has {max(numbers) + 1} "
                "layers; correct config.json"
            )
    others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    raise CheckpointError(
        f"{entries[unknown[0]].file}: tensor {unknown[0]}{others} is not part of the architecture that "
        "config.json describes; check that config.json belongs to this checkpoint"
    )
