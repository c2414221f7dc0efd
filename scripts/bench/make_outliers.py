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


class Outliers:
    """A checkpoint's tensors with channels made larger, and what reads them smaller: the same function."""

    def __init__(self, tensors: dict[str, np.ndarray], seed: int) -> None:
        self.tensors = tensors
        self.count = 0
        self._rng = np.random.default_rng(seed)

    def _pick(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        self.count += CHANNELS
        channels = self._rng.choice(width, CHANNELS, replace=False)
        return channels, self._rng.choice(FACTORS, CHANNELS).astype(np.float32)

    def norm(self, name: str, readers: list[str]) -> None:
        """Channels of a norm larger, the columns that read them smaller."""
        channels, factors = self._pick(len(self.tensors[f"{name}.weight"]))
        for part in ("weight", "bias"):
            if f"{name}.{part}" in self.tensors:
                self.tensors[f"{name}.{part}"][channels] *= factors
        for reader in readers:
            self.tensors[f"{reader}.weight"][:, channels] /= factors

    def rows(self, producer: str, first: int, width: int, reader: str, columns) -> None:
        """Output channels of one projection larger, the columns that read them smaller."""
        channels, factors = self._pick(width)
        for channel, factor in zip(channels, factors, strict=True):
            self.tensors[f"{producer}.weight"][first + channel] *= factor
            if f"{producer}.bias" in self.tensors:
                self.tensors[f"{producer}.bias"][first + channel] *= factor
            self.tensors[f"{reader}.weight"][:, columns(channel)] /= factor


def add_outliers(source: Path, target: Path, seed: int) -> int:
    """Write the changed checkpoint; returns how many channels were scaled."""
    config = json.loads((source / "config.json").read_text())
    tensors = {
        n: t.astype(np.float32) for file in sorted(source.glob("*.safetensors")) for n, t in load_file(file).items()
    }
    outliers = Outliers(tensors, seed)
    _in_vision(outliers, config["vision_config"])
    _in_text(outliers, config["text_config"])
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != "model.safetensors.index.json":
            shutil.copyfile(path, target / path.name)
    config["dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return outliers.count


def _in_vision(outliers: Outliers, vision: dict) -> None:
    names = outliers.tensors
    tower = next(n for n in names if "encoder.layers.0.layer_norm1.weight" in n).split("encoder.layers.0")[0]
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{i}"
        attention = f"{layer}.self_attn"
        outliers.norm(f"{layer}.layer_norm1", [f"{attention}.{p}_proj" for p in "qkv"])
        outliers.norm(f"{layer}.layer_norm2", [f"{layer}.mlp.fc1"])
        outliers.rows(f"{attention}.v_proj", 0, vision["hidden_size"], f"{attention}.out_proj", lambda c: [c])
    if "model.multi_modal_projector.layer_norm.weight" in names:
        outliers.norm("model.multi_modal_projector.layer_norm", ["model.multi_modal_projector.linear_1"])


def _in_text(outliers: Outliers, text: dict) -> None:
    hidden, heads, shared = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    size, group = hidden // heads, heads // shared

    def of_all_queries(c: int) -> list[int]:
        """The columns that read channel c of the values, of each query head that shares it."""
        return [(c // size * group + g) * size + c % size for g in range(group)]

    for i, kind in enumerate(text["layer_types"]):
        layer = f"model.language_model.layers.{i}"
        conv, attention, feed_forward = f"{layer}.conv", f"{layer}.self_attn", f"{layer}.feed_forward"
        if kind == "conv":
            outliers.norm(f"{layer}.operator_norm", [f"{conv}.in_proj"])
            # C, of B, C and the signal
            outliers.rows(f"{conv}.in_proj", hidden, hidden, f"{conv}.out_proj", lambda c: [c])
        else:
            outliers.norm(f"{layer}.operator_norm", [f"{attention}.{p}_proj" for p in "qkv"])
            outliers.rows(f"{attention}.v_proj", 0, shared * size, f"{attention}.out_proj", of_all_queries)
        outliers.norm(f"{layer}.ffn_norm", [f"{feed_forward}.w1", f"{feed_forward}.w3"])
        width = len(outliers.tensors[f"{feed_forward}.w3.weight"])
        outliers.rows(f"{feed_forward}.w3", 0, width, f"{feed_forward}.w2", lambda c: [c])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(add_outliers(options.checkpoint, options.target, options.seed), "channels scaled in", options.target)


if __name__ == "__main__":
    main()
