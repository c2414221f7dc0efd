"""Change a checkpoint without changing its function: outlier channels and massive activations, to try quantizers on.

    python scripts/bench/make_outliers.py demo/checkpoint /tmp/outliers --seed 0

A few channels of every norm become 8 to 64 times larger and the next weights' columns as much smaller; so do a few
channels of the values that attention, the short convolutions and the feed-forward layers hand to their last projection,
which makes the activations of some tokens massive. Such channels are found in trained models; here they are put in
where a small one has none. Weights are written in float32, so that only the order of arithmetic changes. Needs the
`test` extra (safetensors).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

FACTORS = (8.0, 16.0, 32.0, 64.0)
CHANNELS = 3
"""Of each norm and each projection's input."""


def add_outliers(source: Path, target: Path, seed: int) -> int:
    """Write the changed checkpoint; returns how many channels were scaled."""
    rng = np.random.default_rng(seed)
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    tensors = {
        n: t.astype(np.float32) for file in sorted(source.glob("*.safetensors")) for n, t in load_file(file).items()
    }
    count = 0

    def pick(width: int) -> tuple[np.ndarray, np.ndarray]:
        nonlocal count
        count += CHANNELS
        return rng.choice(width, CHANNELS, replace=False), rng.choice(FACTORS, CHANNELS).astype(np.float32)

    def norm(name: str, readers: list[str]) -> None:
        channels, factors = pick(len(tensors[f"{name}.weight"]))
        for part in ("weight", "bias"):
            if f"{name}.{part}" in tensors:
                tensors[f"{name}.{part}"][channels] *= factors
        for reader in readers:
            tensors[f"{reader}.weight"][:, channels] /= factors

    def rows(producer: str, first: int, width: int, reader: str, columns) -> None:
        """Output channels of one projection larger, the columns that read them smaller."""
        channels, factors = pick(width)
        for channel, factor in zip(channels, factors, strict=True):
            tensors[f"{producer}.weight"][first + channel] *= factor
            if f"{producer}.bias" in tensors:
                tensors[f"{producer}.bias"][first + channel] *= factor
            tensors[f"{reader}.weight"][:, columns(channel)] /= factor

    tower = next(n for n in tensors if "encoder.layers.0.layer_norm1.weight" in n).split("encoder.layers.0")[0]
    for i in range(config["vision_config"]["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{i}"
        norm(f"{layer}.layer_norm1", [f"{layer}.self_attn.{p}_proj" for p in "qkv"])
        norm(f"{layer}.layer_norm2", [f"{layer}.mlp.fc1"])
        rows(
            f"{layer}.self_attn.v_proj",
            0,
            config["vision_config"]["hidden_size"],
            f"{layer}.self_attn.out_proj",
            lambda c: [c],
        )
    if "model.multi_modal_projector.layer_norm.weight" in tensors:
        norm("model.multi_modal_projector.layer_norm", ["model.multi_modal_projector.linear_1"])

    hidden, heads, shared = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    size = hidden // heads
    for i, kind in enumerate(text["layer_types"]):
        layer = f"model.language_model.layers.{i}"
        if kind == "conv":
            norm(f"{layer}.operator_norm", [f"{layer}.conv.in_proj"])
            rows(
                f"{layer}.conv.in_proj", hidden, hidden, f"{layer}.conv.out_proj", lambda c: [c]
            )  # C, of B, C and the signal
        else:
            norm(f"{layer}.operator_norm", [f"{layer}.self_attn.{p}_proj" for p in "qkv"])
            group = heads // shared
            rows(
                f"{layer}.self_attn.v_proj",
                0,
                shared * size,
                f"{layer}.self_attn.out_proj",
                lambda c, group=group: [(c // size * group + g) * size + c % size for g in range(group)],
            )
        norm(f"{layer}.ffn_norm", [f"{layer}.feed_forward.w1", f"{layer}.feed_forward.w3"])
        width = len(tensors[f"{layer}.feed_forward.w3.weight"])
        rows(f"{layer}.feed_forward.w3", 0, width, f"{layer}.feed_forward.w2", lambda c: [c])

    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != "model.safetensors.index.json":
            shutil.copyfile(path, target / path.name)
    config["dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(add_outliers(options.checkpoint, options.target, options.seed), "channels scaled in", options.target)


if __name__ == "__main__":
    main()
