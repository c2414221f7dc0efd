"""A checkpoint as transformers' own model: any spelling of config and tensor names, adapters merged. Needs torch and
transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig

from lfm_export.checkpoint.checkpoint import Checkpoint
from lfm_export.checkpoint.config import Config

_PLACES = {
    "model.vision_tower.vision_model.": "vision.",
    "model.multi_modal_projector.": "projector.",
    "model.language_model.": "text.",
}


def load_model(checkpoint: Checkpoint) -> Lfm2VlForConditionalGeneration:
    """float32, on the CPU, attention written out (no fused kernels that a trace could not see into).

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    config = checkpoint.config
    with torch.device("meta"):  # no time is lost on random weights
        model = Lfm2VlForConditionalGeneration(_config(config))
    if not config.projector.layernorm:
        model.model.multi_modal_projector.layer_norm = torch.nn.Identity()  # transformers 4.57 always has one
    weights = {}
    for name, parameter in model.state_dict().items():
        if not (name == "lm_head.weight" and config.text.tied_head):
            weights[name] = torch.from_numpy(checkpoint.read(_place(name), *parameter.shape).copy())
    if config.text.tied_head:
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    language: Any = model.model.language_model
    for rotary in (language.rotary_emb, language.pos_emb):  # computed, not stored: the meta device has left them empty
        rotary.inv_freq, rotary.attention_scaling = rotary.rope_init_fn(rotary.config, torch.device("cpu"))
    return model.eval()


def _place(name: str) -> str:
    for prefix, place in _PLACES.items():
        if name.startswith(prefix):
            return place + name.removeprefix(prefix)
    return "head"


def _config(config: Config) -> Lfm2VlConfig:
    text, vision, projector = config.text, config.vision, config.projector
    text_config: dict[str, Any] = Lfm2Config(
        vocab_size=text.vocabulary,
        hidden_size=text.hidden,
        intermediate_size=text.feed_forward,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=len(text.layers),
        num_attention_heads=text.heads,
        num_key_value_heads=text.kv_heads,
        head_dim=text.head_dim,
        layer_types=list(text.layers),
        max_position_embeddings=text.max_positions,
        conv_L_cache=text.kernel,
        conv_bias=text.conv_bias,
        norm_eps=text.norm_eps,
        rope_theta=text.rope_theta,
        tie_word_embeddings=bool(text.tied_head),
        pad_token_id=None,  # type: ignore[arg-type]
    ).to_dict()
    vision_config: dict[str, Any] = Siglip2VisionConfig(
        hidden_size=vision.hidden,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        intermediate_size=vision.feed_forward,
        patch_size=vision.patch,
        num_channels=vision.channels,
        num_patches=vision.table_side**2,
        layer_norm_eps=vision.norm_eps,
        vision_use_head=False,
    ).to_dict()
    return Lfm2VlConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=config.image_token_id or 0,  # ids are the runtime's business
        downsample_factor=projector.factor,
        projector_hidden_size=projector.hidden,
        projector_bias=projector.bias,
        tie_word_embeddings=bool(text.tied_head),
        attn_implementation="eager",
    )
