"""Write a random checkpoint with the true architecture, for speed and memory work without a download.

    python scripts/make_random_checkpoint.py --size 450m /tmp/lfm2-vl-450m-random

Shapes are those of LFM2-VL; the tokenizer and chat template are the demo model's, with the vocabulary filled up. Weights are
bfloat16, as on the hub, scaled so that activations stay of order one. Needs numpy only.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo" / "checkpoint"
ATTENTION_LAYERS = (2, 5, 8, 10, 12, 14)
SIZES = {
    "450m": {"hidden": 1024, "heads": 16, "ff": 6656, "vision": (768, 12, 12, 3072)},
    "1.6b": {"hidden": 2048, "heads": 32, "ff": 12288, "vision": (1152, 27, 16, 4304)},
}


def config(size: str) -> dict:
    """config.json of the size, as transformers 5 writes it."""
    shape = SIZES[size]
    width, layers, heads, ff = shape["vision"]
    return {
        "architectures": ["Lfm2VlForConditionalGeneration"], "model_type": "lfm2_vl", "dtype": "bfloat16",
        "downsample_factor": 2, "image_token_id": 396, "projector_bias": True, "projector_hidden_act": "gelu",
        "projector_hidden_size": 2560, "projector_use_layernorm": True, "tie_word_embeddings": True,
        "text_config": {
            "model_type": "lfm2", "hidden_size": shape["hidden"], "intermediate_size": shape["ff"],
            "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256,
            "num_hidden_layers": 16, "num_attention_heads": shape["heads"], "num_key_value_heads": 8,
            "layer_types": ["full_attention" if i in ATTENTION_LAYERS else "conv" for i in range(16)],
            "conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5, "vocab_size": 65536,
            "max_position_embeddings": 128000, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0, "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "siglip2_vision_model", "hidden_size": width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "intermediate_size": ff, "patch_size": 16, "num_channels": 3, "num_patches": 256,
            "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0, "vision_use_head": False,
        },
    }  # fmt: skip


def tensors(cfg: dict) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """(name, shape, standard deviation) of every tensor; 0 means ones for a norm's weight and zeros for a bias."""
    v, t = cfg["vision_config"], cfg["text_config"]
    d, ff = v["hidden_size"], v["intermediate_size"]

    def linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...], float]]:
        yield f"{name}.weight", (rows, columns), 1 / math.sqrt(columns)
        if bias:
            yield f"{name}.bias", (rows,), 0

    def norm(name: str, width: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...], float]]:
        yield f"{name}.weight", (width,), 0
        if bias:
            yield f"{name}.bias", (width,), 0

    tower = "model.vision_tower.vision_model"
    yield from linear(f"{tower}.embeddings.patch_embedding", d, 768, True)
    yield f"{tower}.embeddings.position_embedding.weight", (v["num_patches"], d), 0.02
    for i in range(v["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{name}", d, d, True)
        yield from linear(f"{layer}.mlp.fc1", ff, d, True)
        yield from linear(f"{layer}.mlp.fc2", d, ff, True)
        yield from norm(f"{layer}.layer_norm1", d, True)
        yield from norm(f"{layer}.layer_norm2", d, True)
    yield from norm(f"{tower}.post_layernorm", d, True)

    h, heads, kv = t["hidden_size"], t["num_attention_heads"], t["num_key_value_heads"]
    width = cfg["projector_hidden_size"]
    yield from norm("model.multi_modal_projector.layer_norm", 4 * d, True)
    yield from linear("model.multi_modal_projector.linear_1", width, 4 * d, True)
    yield from linear("model.multi_modal_projector.linear_2", h, width, True)

    inner = t["block_multiple_of"] * math.ceil(int(2 * t["intermediate_size"] / 3) / t["block_multiple_of"])
    head = h // heads
    yield "model.language_model.embed_tokens.weight", (t["vocab_size"], h), 0.02
    for i, kind in enumerate(t["layer_types"]):
        layer = f"model.language_model.layers.{i}"
        if kind == "conv":
            yield from linear(f"{layer}.conv.in_proj", 3 * h, h, False)
            yield f"{layer}.conv.conv.weight", (h, 1, t["conv_L_cache"]), 0.5
            yield from linear(f"{layer}.conv.out_proj", h, h, False)
        else:
            yield from linear(f"{layer}.self_attn.q_proj", heads * head, h, False)
            yield from linear(f"{layer}.self_attn.k_proj", kv * head, h, False)
            yield from linear(f"{layer}.self_attn.v_proj", kv * head, h, False)
            yield from linear(f"{layer}.self_attn.out_proj", h, heads * head, False)
            yield from norm(f"{layer}.self_attn.q_layernorm", head, False)
            yield from norm(f"{layer}.self_attn.k_layernorm", head, False)
        yield from linear(f"{layer}.feed_forward.w1", inner, h, False)
        yield from linear(f"{layer}.feed_forward.w3", inner, h, False)
        yield from linear(f"{layer}.feed_forward.w2", h, inner, False)
        yield from norm(f"{layer}.operator_norm", h, False)
        yield from norm(f"{layer}.ffn_norm", h, False)
    yield from norm("model.language_model.embedding_norm", h, False)


def write_weights(path: Path, cfg: dict, seed: int) -> int:
    """safetensors in bfloat16, streamed; returns the number of parameters."""
    listed = list(tensors(cfg))
    header, at = {}, 0
    for name, shape, _ in listed:
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape, deviation in listed:
            if deviation:
                for start in range(0, math.prod(shape), 1 << 22):
                    n = min(1 << 22, math.prod(shape) - start)
                    values = rng.standard_normal(n, np.float32) * np.float32(deviation)
                    f.write((values.view(np.uint32) >> 16).astype(np.uint16).data)
            else:
                values = np.full(math.prod(shape), 0.0 if name.endswith("bias") else 1.0, np.float32)
                f.write((values.view(np.uint32) >> 16).astype(np.uint16).data)
    return at // 2


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """The demo tokenizer with LFM2's ids for the special tokens and unused entries up to `vocabulary`."""
    spec = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    fixed = {"<|pad|>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "<|im_start|>": 6, "<|im_end|>": 7, "<image>": 396,
             "<|img_thumbnail|>": 497, "<|image_start|>": 498, "<|image_end|>": 499}  # fmt: skip
    fixed.update({f"<|img_row_{r + 1}_col_{c + 1}|>": 397 + 10 * r + c for r in range(10) for c in range(10)})
    ordinary = [token for token in sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get) if token not in fixed]
    vocab = {**fixed, **{token: 500 + i for i, token in enumerate(ordinary)}}
    used = set(vocab.values())
    vocab.update({f"<|unused_{i}|>": i for i in range(vocabulary) if i not in used})
    spec["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    for token in spec["added_tokens"]:
        token["id"] = vocab[token["content"]]
    for token in spec["post_processor"]["special_tokens"].values():
        token["ids"] = [vocab[name] for name in token["tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    cfg = config(options.size)
    parameters = write_weights(options.folder / "model.safetensors", cfg, options.seed)
    (options.folder / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    (options.folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}, indent=2) + "\n"
    )
    preprocessor = json.loads((DEMO / "preprocessor_config.json").read_text())
    preprocessor.update(tile_size=512, min_image_tokens=64, max_image_tokens=256, max_num_patches=1024)
    (options.folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    write_tokenizer(options.folder, cfg["text_config"]["vocab_size"])
    print(f"{options.folder}: {parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
