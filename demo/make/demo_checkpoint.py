"""The demo model before and after its training: tokenizer, architecture with random weights, and the hub's files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import demo_data
import torch
import torchvision_shim  # noqa: F401
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig

VOCABULARY = 640
IMAGE_ROWS_COLUMNS = 10
CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{- "<|im_start|>" + message["role"] + "\\n" -}}
{%- if message["content"] is string -%}
{{- message["content"] -}}
{%- else -%}
{%- for item in message["content"] -%}
{%- if item["type"] == "image" -%}
{{- "<image>" -}}
{%- elif item["type"] == "text" -%}
{{- item["text"] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""
# The pre-tokenizer of LFM2's tokenizer.json.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = [
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    *(f"<|img_row_{r + 1}_col_{c + 1}|>" for r in range(IMAGE_ROWS_COLUMNS) for c in range(IMAGE_ROWS_COLUMNS)),
    "<|img_thumbnail|>",
    "<|image_start|>",
    "<|image_end|>",
]


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over the lower-case words of the task; upper-case text and digits stay one token a character."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    lines = []
    for _ in range(4000):
        for task, question, answer in demo_data.draw_sample(rng, "shapes", 128, 128).questions:
            lines += [question, answer, "user\n", "assistant\n", "system\n"] if task else []
    lines += [*demo_data.READ] * 2000
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[AddedToken(t, normalized=False, special=True) for t in SPECIAL],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    bos = tokenizer.token_to_id("<|startoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", bos)]
    )
    return tokenizer


def build_model(tokenizer: Tokenizer) -> Lfm2VlForConditionalGeneration:
    ids = {
        name: tokenizer.token_to_id(token)
        for name, token in (("pad", "<|pad|>"), ("bos", "<|startoftext|>"), ("eos", "<|im_end|>"), ("image", "<image>"))
    }
    config = Lfm2VlConfig(
        vision_config=Siglip2VisionConfig(
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            patch_size=16,
            num_patches=256,
            vision_use_head=False,
            attention_dropout=0.0,
        ).to_dict(),
        text_config=Lfm2Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            conv_L_cache=3,
            block_auto_adjust_ff_dim=False,
            max_position_embeddings=4096,
            layer_types=["conv", "full_attention"] * 3,
            rope_theta=10000.0,
            pad_token_id=ids["pad"],
            bos_token_id=ids["bos"],
            eos_token_id=ids["eos"],
        ).to_dict(),
        image_token_id=ids["image"],
        projector_hidden_size=384,
        downsample_factor=2,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = Lfm2VlForConditionalGeneration(config)
    embeddings = model.model.vision_tower.vision_model.embeddings
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(_sincos(16, config.vision_config.hidden_size) * 0.5)
    return model


def _sincos(side: int, width: int) -> torch.Tensor:
    quarter = width // 4
    omega = 1.0 / (100.0 ** (torch.arange(quarter) / quarter))
    ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (ys, xs)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


_IMAGE_TOKENS = {
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail": "<|img_thumbnail|>",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|pad|>",
    **_IMAGE_TOKENS,
    "extra_special_tokens": _IMAGE_TOKENS,  # where transformers 4 looks for them
    "model_max_length": 4096,
    "add_bos_token": True,
    "clean_up_tokenization_spaces": False,
}
PREPROCESSOR_CONFIG = {
    "image_processor_type": "Lfm2VlImageProcessorFast",
    "processor_class": "Lfm2VlProcessor",
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "downsample_factor": 2,
    "encoder_patch_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_tokens": 64,
    "max_num_patches": 256,
    "max_pixels_tolerance": 2.0,
    "max_tiles": 10,
    "min_image_tokens": 16,
    "min_tiles": 2,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "return_row_col_info": True,
    "tile_size": 256,
    "use_thumbnail": True,
}


def save_checkpoint(model: Lfm2VlForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files of a hub checkpoint, weights in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("lm_head")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = _without_defaults(config)
    config["model_type"] = "lfm2_vl"  # transformers 4.57 writes lfm2-vl, which its own AutoConfig does not know
    config["dtype"] = "float16"
    config["architectures"] = ["Lfm2VlForConditionalGeneration"]
    _write(folder / "config.json", config)
    text = model.config.text_config
    _write(
        folder / "generation_config.json",
        {
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": text.pad_token_id,
            "do_sample": False,
            "max_new_tokens": 64,
            "repetition_penalty": 1.0,
        },
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    _write(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write(folder / "preprocessor_config.json", PREPROCESSOR_CONFIG)


def _without_defaults(config: dict) -> dict:
    """The keys that describe the architecture; generation and bookkeeping defaults of PretrainedConfig say nothing."""
    text = (
        "block_auto_adjust_ff_dim",
        "bos_token_id",
        "conv_L_cache",
        "conv_bias",
        "eos_token_id",
        "hidden_size",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "model_type",
        "norm_eps",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    )
    vision = (
        "attention_dropout",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_norm_eps",
        "model_type",
        "num_attention_heads",
        "num_channels",
        "num_hidden_layers",
        "num_patches",
        "patch_size",
        "vision_use_head",
    )
    top = (
        "downsample_factor",
        "image_token_id",
        "model_type",
        "projector_bias",
        "projector_hidden_act",
        "projector_hidden_size",
        "tie_word_embeddings",
    )
    return {
        **{key: config[key] for key in top if key in config},
        "text_config": {key: config["text_config"][key] for key in text if key in config["text_config"]},
        "vision_config": {key: config["vision_config"][key] for key in vision if key in config["vision_config"]},
    }


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
