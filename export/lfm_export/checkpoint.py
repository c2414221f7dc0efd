"""A checkpoint folder as the export sees it: the architecture, and weights by their place in it.

Knows how hub files spell tensor names and how a LoRA adapter changes them; knows nothing about graphs.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lfm_export.config import CheckpointError, Config, load_config
from lfm_export.lora import ADAPTER_WEIGHTS, Adapter
from lfm_export.tensors import Floats, TensorStore, checkpoint_files

# Tensor names differ between transformers 4 (hub files), transformers 5 and older remote code.
_VISION = ("model.vision_tower.vision_model.", "model.vision_tower.", "vision_tower.vision_model.", "vision_tower.")
_PROJECTOR = ("model.multi_modal_projector.", "multi_modal_projector.")
_TEXT = ("model.language_model.", "language_model.model.", "language_model.")
_SAMPLE = 1 << 20
_HEAD = ("lm_head.weight", "language_model.lm_head.weight")
_HUB_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json", "README.md", "LICENSE",
)  # fmt: skip


def copy_hub_files(checkpoint_folder: Path, folder: Path) -> None:
    """All that is not weights, as it is."""
    for name in _HUB_FILES:
        if (checkpoint_folder / name).exists():
            shutil.copyfile(checkpoint_folder / name, folder / name)


class Checkpoint:
    """Weights are asked for as `vision.…`, `projector.…`, `text.…` or `head`, with the shape the config implies."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; give the folder of a Hugging Face checkpoint")
        self.folder = folder
        self.config: Config = load_config(folder)
        self.files = checkpoint_files(folder)
        self.store = TensorStore(self.files)
        if self.config.text.tied_head is None:
            tied = not any(name in self.store for name in _HEAD)
            self.config = replace(self.config, text=replace(self.config.text, tied_head=tied))
        self.adapter = Adapter.load(adapter) if adapter else None
        self._prefix = {
            "vision": self._find(_VISION, "embeddings.patch_embedding.weight"),
            "projector": self._find(_PROJECTOR, "linear_1.weight"),
            "text": self._find(_TEXT, "embed_tokens.weight"),
        }
        if self.adapter:
            self.adapter.check_targets(self.store)

    def _find(self, prefixes: tuple[str, ...], probe: str) -> str:
        for prefix in prefixes:
            if prefix + probe in self.store:
                return prefix
        raise CheckpointError(f"{self.folder}: no tensor {prefixes[0]}{probe} (or its other spellings) in the checkpoint")

    def fingerprint(self) -> str:
        """Tells these weights from others: a hash over every file's header and the ends of its data, not over gigabytes."""
        files = [*self.files, *([self.adapter.folder / ADAPTER_WEIGHTS] if self.adapter else [])]
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in files:
            with file.open("rb") as f:
                digest.update(f.read(_SAMPLE))
                f.seek(max(0, file.stat().st_size - _SAMPLE))
                digest.update(f.read(_SAMPLE))
        return digest.hexdigest()[:32]

    def tensor_name(self, place: str) -> str:
        """`text.layers.0.ffn_norm.weight` → the name in the file."""
        if place == "head":
            return next((name for name in _HEAD if name in self.store), _HEAD[0])
        part, _, rest = place.partition(".")
        return self._prefix[part] + rest

    def read(self, place: str, *shape: int) -> Floats:
        """float32 of `shape`, with the adapter merged in."""
        name = self.tensor_name(place)
        weight = self.store.read(name, shape)
        return self.adapter.merge(name, weight) if self.adapter else weight

    def read_transposed(self, places: list[str], rows: list[int], columns: int) -> Floats:
        """Linear weights [rows_i, columns] → one [columns, sum of rows], contiguous: what MatMul multiplies by."""
        out = np.empty((columns, sum(rows)), np.float32)
        at = 0
        for place, n in zip(places, rows, strict=True):
            out[:, at : at + n] = self.read(place, n, columns).T
            at += n
        return out

    def chunks(self, place: str, *shape: int) -> Iterator[Floats]:
        """A large table in pieces. With an adapter on it, in one."""
        name = self.tensor_name(place)
        if self.adapter and self.adapter.touches(name):
            yield self.read(place, *shape)
        else:
            yield from self.store.chunks(name, shape)
