"""config.json in all its spellings → one frozen description of the architecture. Unknown keys are upstream's business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm_runtime.contract import LayerKind
from lfm_runtime.errors import EdgeError
from lfm_runtime.files import damage_is, read_json_object

MODEL_TYPES = ("lfm2_vl", "lfm2-vl")  # transformers, and the hub's first files


class CheckpointError(EdgeError, ValueError):
    """The checkpoint folder is incomplete, damaged, or of another architecture."""


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP2 NaFlex encoder."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    patch: int  # pixels a side
    channels: int
    table_side: int  # the position table is table_side × table_side
    norm_eps: float


@dataclass(frozen=True)
class ProjectorConfig:
    """Pixel unshuffle, optional LayerNorm, two linear layers."""

    factor: int
    hidden: int
    bias: bool
    layernorm: bool


@dataclass(frozen=True)
class TextConfig:
    """LFM2 decoder: gated short convolutions and grouped-query attention."""

    hidden: int
    layers: tuple[LayerKind, ...]
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    kernel: int
    conv_bias: bool
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied_head: bool | None  # None: the config contradicts itself, a head in the weights decides


@dataclass(frozen=True)
class Config:
    """A whole checkpoint."""

    vision: VisionConfig
    projector: ProjectorConfig
    text: TextConfig
    image_token_id: int


def load_config(folder: Path) -> Config:
    """Read `folder/config.json`.

    Raises:
        CheckpointError: missing file, another architecture, or a part we cannot export, named.
    """
    path = folder / "config.json"
    raw = read_json_object(path, CheckpointError)
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{path}: model_type is {model_type!r}; lfm-edge exports {', '.join(MODEL_TYPES)} (LFM2-VL, LFM2.5-VL)"
        )
    with damage_is(CheckpointError, path, "is this a complete LFM2-VL checkpoint?"):
        config = Config(
            _vision(raw["vision_config"]), _projector(raw), _text(raw, raw["text_config"]),
            int(_first(raw, "image_token_id", "image_token_index", default=396)),
        )  # fmt: skip
    _check(config, path)
    return config


def _check(config: Config, path: Path) -> None:
    text, vision, projector = config.text, config.vision, config.projector
    sizes = {
        "hidden_size": text.hidden, "num_attention_heads": text.heads, "num_key_value_heads": text.kv_heads, "head_dim": text.head_dim,
        "intermediate_size": text.feed_forward, "vocab_size": text.vocabulary, "conv_L_cache": text.kernel,
        "max_position_embeddings": text.max_positions, "vision hidden_size": vision.hidden, "vision num_hidden_layers": vision.layers,
        "vision num_attention_heads": vision.heads, "vision intermediate_size": vision.feed_forward, "patch_size": vision.patch,
        "num_channels": vision.channels, "downsample_factor": projector.factor, "projector_hidden_size": projector.hidden,
    }  # fmt: skip
    for name, value in sizes.items():
        if value < 1:
            raise CheckpointError(f"{path}: {name} is {value}; it must be 1 or above")
    if text.heads % text.kv_heads or text.head_dim % 2 or vision.hidden % vision.heads:
        raise CheckpointError(
            f"{path}: {text.heads} heads over {text.kv_heads} key-value heads of {text.head_dim}, and {vision.heads} vision heads in "
            f"{vision.hidden}, do not divide"
        )


def _first(raw: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first spelling that is present and not null."""
    return next((raw[name] for name in names if raw.get(name) is not None), default)


def _text(top: Mapping[str, Any], raw: Mapping[str, Any]) -> TextConfig:
    count = int(raw["num_hidden_layers"])
    layers = raw.get("layer_types")
    if layers is None:
        attention = raw.get("full_attn_idxs")
        attention = range(count) if attention is None else attention
        layers = ["full_attention" if i in attention else "conv" for i in range(count)]
    if len(layers) != count or set(layers) - {"conv", "full_attention"}:
        raise CheckpointError(f"layer_types must name {count} layers, each conv or full_attention")
    rope = raw.get("rope_parameters") or {}
    for source in (rope, raw.get("rope_scaling") or {}):
        kind = source.get("rope_type", source.get("type", "default"))
        if kind != "default" or any(isinstance(value, dict) for value in source.values()):
            raise CheckpointError(f"config.json: rope {source} cannot be exported; only rope_type default")
    hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    return TextConfig(
        hidden=hidden,
        layers=tuple(layers),
        heads=heads,
        kv_heads=int(raw["num_key_value_heads"]),
        head_dim=int(_first(raw, "head_dim", default=hidden // heads)),
        feed_forward=_feed_forward(raw),
        vocabulary=int(raw["vocab_size"]),
        kernel=int(_first(raw, "conv_L_cache", default=3)),
        conv_bias=bool(_first(raw, "conv_bias", default=False)),
        norm_eps=float(_first(raw, "norm_eps", "block_norm_eps", default=1e-5)),
        rope_theta=float(_first({**raw, **rope}, "theta", "rope_theta", default=1_000_000.0)),
        max_positions=int(_first(raw, "max_position_embeddings", default=128_000)),
        tied_head=_tied(top, raw),
    )


def _tied(top: Mapping[str, Any], raw: Mapping[str, Any]) -> bool | None:
    """None where the two places disagree: transformers 4 reads the inner one, transformers 5 the outer one."""
    outer, inner = top.get("tie_word_embeddings"), _first(raw, "tie_embedding", "tie_word_embeddings")
    if outer is not None and inner is not None and outer != inner:
        return None
    return bool(_first({"inner": inner, "outer": outer}, "inner", "outer", default=True))


def _feed_forward(raw: Mapping[str, Any]) -> int:
    """Width after the auto-adjustment of Lfm2MLP."""
    width = int(_first(raw, "block_ff_dim", "intermediate_size", default=12288))
    if _first(raw, "block_auto_adjust_ff_dim", default=True):
        width = int(2 * width / 3)
        multiplier = raw.get("block_ffn_dim_multiplier", 1.0)
        if multiplier is not None:
            multiple = int(_first(raw, "block_multiple_of", default=256))
            width = multiple * -(-int(multiplier * width) // multiple)
    return width


def _vision(raw: Mapping[str, Any]) -> VisionConfig:
    activation = raw.get("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise CheckpointError(f"vision hidden_act {activation!r} cannot be exported; only gelu_pytorch_tanh")
    patches = int(_first(raw, "num_patches", default=256))
    side = round(patches**0.5)
    if side * side != patches:
        raise CheckpointError(f"vision num_patches {patches} is not a square")
    return VisionConfig(
        hidden=int(_first(raw, "hidden_size", default=768)),
        layers=int(_first(raw, "num_hidden_layers", default=12)),
        heads=int(_first(raw, "num_attention_heads", default=12)),
        feed_forward=int(_first(raw, "intermediate_size", default=3072)),
        patch=int(_first(raw, "patch_size", default=16)),
        channels=int(_first(raw, "num_channels", default=3)),
        table_side=side,
        norm_eps=float(_first(raw, "layer_norm_eps", default=1e-6)),
    )


def _projector(raw: Mapping[str, Any]) -> ProjectorConfig:
    activation = raw.get("projector_hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(f"projector_hidden_act {activation!r} cannot be exported; only gelu")
    return ProjectorConfig(
        factor=int(_first(raw, "downsample_factor", default=2)),
        hidden=int(_first(raw, "projector_hidden_size", default=2560)),
        bias=bool(_first(raw, "projector_bias", default=True)),
        layernorm=bool(_first(raw, "projector_use_layernorm", default=True)),
    )
