"""config.json in all its spellings → one frozen description of the architecture. Unknown keys are upstream's business;
a known key with a value of another kind is an error that names it.

Flags are what the file says: `Checkpoint` compares them with the tensors, which decide.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.contract import LayerKind
from lfm_runtime.formats.files import read_json_object

_MOST_LAYERS = 1000
MODEL_TYPES = ("lfm2_vl", "lfm2-vl")  # transformers, and the hub's first files


class CheckpointError(EdgeError, ValueError):
    """The checkpoint folder is incomplete, damaged, or of another architecture."""


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the SigLIP2 NaFlex vision encoder."""

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
    other_feed_forward: int  # the width if block_auto_adjust_ff_dim were the other way round
    vocabulary: int
    kernel: int
    conv_bias: bool
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied_head: bool | None  # None: the config contradicts itself


@dataclass(frozen=True)
class Config:
    """Shapes of a checkpoint's vision encoder, projector and decoder."""

    vision: VisionConfig
    projector: ProjectorConfig
    text: TextConfig
    image_token_id: int | None  # None: the config says nothing, the tokenizer knows


class Section:
    """An object of config.json. Values are asked for by kind; the first spelling present and not null counts."""

    def __init__(self, path: Path, name: str, raw: Any) -> None:
        if not isinstance(raw, dict):
            raise CheckpointError(
                f"{path}: {name or 'it'} is {_shown(raw)}, not an object; is this a complete LFM2-VL checkpoint?"
            )
        self.path, self.name, self.raw = path, name, raw

    def inner(self, name: str) -> Section:
        """Return the object `name` inside this one; an empty one where it is missing."""
        found = self.raw.get(name)
        return Section(self.path, f"{self._prefix}{name}", {} if found is None else found)

    def find(self, *names: str) -> tuple[str, Any]:
        """Return (spelling, value) of the first name that has a value; (the first name, None) where none has."""
        return next(((name, self.raw[name]) for name in names if self.raw.get(name) is not None), (names[0], None))

    def integer(self, *names: str, default: int | None = None, least: int = 1, most: int = 1 << 31) -> int:
        """A whole number from `least` to `most`; an error where it is missing and has no default."""
        name, value = self.find(*names)
        if value is None and default is not None:
            return default
        if value is None:
            raise CheckpointError(
                f"{self.path}: {self._prefix}{name} is missing; is this a complete LFM2-VL checkpoint?"
            )
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            limit = f", at most {most}," if most < 1 << 31 or (type(value) is int and value > most) else ""
            raise self.wrong(name, value, f"a whole number of {least} or more{limit}")
        return value

    def number(self, *names: str, default: float) -> float:
        """Return a number above 0; `default` where it is missing, CheckpointError where it is something else."""
        name, value = self.find(*names)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e12:
            raise self.wrong(name, value, "a number above 0 and below 1e12")
        return float(value)

    def flag(self, *names: str) -> bool | None:
        """Return true or false; None where it is missing, CheckpointError where it is something else."""
        name, value = self.find(*names)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def only(self, name: str, *known: Any) -> None:
        """Raise CheckpointError unless the setting is missing or has one of the `known` values."""
        value = self.raw.get(name)
        if value is not None and value not in known:
            names = " or ".join(map(str, known))
            raise CheckpointError(f"{self.path}: {self._prefix}{name} {_shown(value)} cannot be exported; only {names}")

    def wrong(self, name: str, value: Any, wanted: str) -> CheckpointError:
        """Return the error for a value of the wrong type or range."""
        return CheckpointError(f"{self.path}: {self._prefix}{name} is {_shown(value)}; {wanted} is needed")

    @property
    def _prefix(self) -> str:
        return f"{self.name}." if self.name else ""


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def load_config(folder: Path) -> Config:
    """Read `folder/config.json`.

    Raises:
        CheckpointError: missing file, another architecture, a value of another kind, or a part we cannot export; names
            key and value.
    """
    path = folder / "config.json"
    top = Section(path, "", read_json_object(path, CheckpointError, advice="download it again"))
    model_type = top.raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{path}: model_type is {model_type!r}; lfm-edge exports {', '.join(MODEL_TYPES)} (LFM2-VL, LFM2.5-VL)"
        )
    for key, which in (("quantization_config", "quant_method"), ("quantization", "mode")):
        if found := top.raw.get(key):
            method = found.get(which) if isinstance(found, dict) else None
            by = "MLX" if key == "quantization" else method or "another tool"
            raise quantized(folder, str(by))
    for part in ("text_config", "vision_config"):
        if part not in top.raw:
            raise CheckpointError(f"{path}: {part} is missing; is this a complete LFM2-VL checkpoint?")
    image = top.integer("image_token_id", "image_token_index", default=-1, least=0)
    config = Config(
        _vision(top.inner("vision_config")),
        _projector(top),
        _text(top, top.inner("text_config")),
        None if image < 0 else image,
    )
    _check(config, path)
    return config


def quantized(folder: Path, by: str) -> CheckpointError:
    """Return the error for weights that another tool has quantized."""
    return CheckpointError(
        f"{folder}: its weights were quantized by {by}; export the original checkpoint, and quantize the bundle"
    )


def _check(config: Config, path: Path) -> None:
    text, vision = config.text, config.vision
    for wrong, what in (
        (text.heads % text.kv_heads, f"{text.heads} heads over {text.kv_heads} key-value heads"),
        (text.head_dim % 2, f"{text.head_dim} numbers of a head in two halves"),
        (vision.hidden % vision.heads, f"{vision.heads} vision heads in a width of {vision.hidden}"),
    ):
        if wrong:
            raise CheckpointError(f"{path}: {what} do not divide; correct config.json")


def _text(top: Section, text: Section) -> TextConfig:
    text.only("model_type", "lfm2")
    hidden, heads = text.integer("hidden_size"), text.integer("num_attention_heads")
    feed_forward = _feed_forward(text)
    outer, inner = top.flag("tie_word_embeddings"), text.flag("tie_embedding", "tie_word_embeddings")
    return TextConfig(
        hidden=hidden,
        layers=_layers(text),
        heads=heads,
        kv_heads=text.integer("num_key_value_heads"),
        head_dim=text.integer("head_dim", default=hidden // heads),
        feed_forward=feed_forward[0],
        other_feed_forward=feed_forward[1],
        vocabulary=text.integer("vocab_size"),
        kernel=text.integer("conv_L_cache", default=3),
        conv_bias=text.flag("conv_bias") or False,
        norm_eps=text.number("norm_eps", "block_norm_eps", default=1e-5),
        rope_theta=_rope_theta(text),
        max_positions=text.integer("max_position_embeddings", default=128_000),
        # Where the two places disagree transformers 4 reads the inner one, transformers 5 the outer one.
        tied_head=True
        if outer is inner is None
        else inner
        if outer in (None, inner)
        else outer
        if inner is None
        else None,
    )


def _layers(text: Section) -> tuple[LayerKind, ...]:
    count = text.integer("num_hidden_layers", most=_MOST_LAYERS)
    layers = text.raw.get("layer_types")
    if layers is None:
        attention = text.raw.get("full_attn_idxs")
        if attention is not None and not (isinstance(attention, list) and all(type(i) is int for i in attention)):
            raise text.wrong("full_attn_idxs", attention, "a list of layer numbers")
        attention = range(count) if attention is None else attention
        layers = ["full_attention" if i in attention else "conv" for i in range(count)]
    if not isinstance(layers, list) or any(layer not in ("conv", "full_attention") for layer in layers):
        raise text.wrong("layer_types", layers, "a list of conv and full_attention")
    if len(layers) != count:
        raise CheckpointError(
            f"{text.path}: text_config.num_hidden_layers is {count}, layer_types names {len(layers)} layers; "
            "correct one"
        )
    return tuple(layers)


def _rope_theta(text: Section) -> float:
    for name in ("rope_parameters", "rope_scaling"):
        rope = text.inner(name)
        kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
        others = rope.raw.keys() - {"rope_type", "type", "rope_theta", "theta", "original_max_position_embeddings"}
        if kind != "default" or any(rope.raw[key] not in (None, 1, 1.0) for key in others):
            raise CheckpointError(
                f"{text.path}: {rope.name} {_shown(rope.raw)} cannot be exported; only rope_type default"
            )
    inner = text.inner("rope_parameters").number("theta", "rope_theta", default=0.0)
    return inner or text.number("theta", "rope_theta", default=1_000_000.0)


def _feed_forward(text: Section) -> tuple[int, int]:
    """(width, width if block_auto_adjust_ff_dim were the other way round) of Lfm2MLP."""
    plain = text.integer("block_ff_dim", "intermediate_size", default=12288)
    width = int(2 * plain / 3)
    if "block_ffn_dim_multiplier" not in text.raw or text.raw["block_ffn_dim_multiplier"] is not None:
        multiple = text.integer("block_multiple_of", default=256)
        width = multiple * -(-int(text.number("block_ffn_dim_multiplier", default=1.0) * width) // multiple)
    adjusted = text.flag("block_auto_adjust_ff_dim")
    return (plain, width) if adjusted is False else (width, plain)


def _vision(vision: Section) -> VisionConfig:
    vision.only("hidden_act", "gelu_pytorch_tanh")
    vision.only("num_channels", 3)
    vision.only("model_type", "siglip2_vision_model", "siglip2")
    patches = vision.integer("num_patches", default=256)
    side = round(patches**0.5)
    if side * side != patches:
        raise CheckpointError(f"{vision.path}: vision_config.num_patches {patches} is not a square")
    return VisionConfig(
        hidden=vision.integer("hidden_size", default=768),
        layers=vision.integer("num_hidden_layers", default=12, most=_MOST_LAYERS),
        heads=vision.integer("num_attention_heads", default=12),
        feed_forward=vision.integer("intermediate_size", default=3072),
        patch=vision.integer("patch_size", default=16),
        channels=vision.integer("num_channels", default=3),
        table_side=side,
        norm_eps=vision.number("layer_norm_eps", default=1e-6),
    )


def _projector(top: Section) -> ProjectorConfig:
    top.only("projector_hidden_act", "gelu")
    bias, layernorm = top.flag("projector_bias"), top.flag("projector_use_layernorm")
    return ProjectorConfig(
        factor=top.integer("downsample_factor", default=2),
        hidden=top.integer("projector_hidden_size", default=2560),
        bias=bias is not False,
        layernorm=layernorm is not False,
    )
