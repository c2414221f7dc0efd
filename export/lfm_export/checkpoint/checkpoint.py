"""A checkpoint folder as the export sees it: the architecture, and weights by their place in it.

Knows how hub files spell tensor names and how a LoRA adapter changes them; knows nothing about graphs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lfm_runtime.formats.manifest import file_hash
from lfm_runtime.setup.hub import SETTINGS_FILES

from lfm_export.checkpoint.config import CheckpointError, Config, TextConfig, load_config
from lfm_export.checkpoint.inventory import check_origin, check_tensors, places
from lfm_export.checkpoint.lora import ADAPTER_WEIGHTS, Adapter
from lfm_export.checkpoint.tensors import Floats, TensorStore, check_folder, checkpoint_files

# Tensor names differ between transformers 4 (hub files), transformers 5 and older remote code.
_VISION = ("model.vision_tower.vision_model.", "model.vision_tower.", "vision_tower.vision_model.", "vision_tower.")
_PROJECTOR = ("model.multi_modal_projector.", "multi_modal_projector.")
_TEXT = ("model.language_model.", "language_model.model.", "language_model.")
_HEAD = ("lm_head.weight", "language_model.lm_head.weight")


def copy_hub_files(checkpoint_folder: Path, folder: Path) -> None:
    """Copy the checkpoint's files other than weights, unchanged; missing ones are skipped."""
    for name in SETTINGS_FILES:
        if (checkpoint_folder / name).exists():
            shutil.copyfile(checkpoint_folder / name, folder / name)


class Checkpoint:
    """Weights are asked for as `vision.…`, `projector.…`, `text.…` or `head`, with the shape the config implies.

    What the tensors say decides over flags of config.json; `notes` has a line for every flag that they decided
    otherwise.
    """

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        """Raises CheckpointError for whatever cannot be exported as it is; names the file, the tensor or the key."""
        check_folder(folder)
        self.folder = folder
        self.files = checkpoint_files(folder)
        self.config: Config = load_config(folder)
        self.store = TensorStore(self.files)
        check_origin(folder, self.store.entries)
        self.notes: list[str] = []
        self._prefix = {
            "vision": self._find(_VISION, "embeddings.patch_embedding.weight"),
            "projector": self._find(_PROJECTOR, "linear_1.weight"),
            "text": self._find(_TEXT, "embed_tokens.weight"),
        }
        self.adapter = Adapter.load(adapter) if adapter else None
        if self.adapter:
            self.adapter.check_targets(self.store)
        self.config = self._as_the_tensors_say(self.config)
        names = {place: self.tensor_name(place) for place in places(self.config)}
        if self.config.text.tied_head and self.tensor_name("head") in self.store:
            names["head"] = self.tensor_name("head")  # a copy of the table
        check_tensors(folder, self.store.entries, names, self.config)

    def _find(self, prefixes: tuple[str, ...], probe: str) -> str:
        for prefix in prefixes:
            if prefix + probe in self.store:
                return prefix
        raise CheckpointError(
            f"{self.folder}: the checkpoint has no tensor {prefixes[0]}{probe} (or its names in other releases); "
            "check that it is a complete LFM2-VL checkpoint"
        )

    def _as_the_tensors_say(self, config: Config) -> Config:
        """The config with the flags that tensors know better, each with a note where they differ."""
        text, projector = config.text, config.projector

        def there(place: str) -> bool:
            return self.tensor_name(place) in self.store

        def decided(key: str, said: Any, found: Any, because: str) -> Any:
            if said != found:
                self.notes.append(
                    f"config.json says {key} {json.dumps(said)}, the checkpoint {because}: {json.dumps(found)} is used"
                )
            return found

        norm = decided(
            "projector_use_layernorm",
            projector.layernorm,
            there("projector.layer_norm.weight"),
            f"has {'a' if there('projector.layer_norm.weight') else 'no'} projector LayerNorm",
        )
        bias = decided(
            "projector_bias",
            projector.bias,
            there("projector.linear_1.bias"),
            f"has {'a' if there('projector.linear_1.bias') else 'no'} bias there",
        )
        convolution = next(
            (f"text.layers.{i}.conv.in_proj.bias" for i, kind in enumerate(text.layers) if kind == "conv"), ""
        )
        conv_bias = text.conv_bias
        if convolution:
            conv_bias = decided(
                "conv_bias", conv_bias, there(convolution), f"has {'a' if there(convolution) else 'no'} bias there"
            )
        width = text.feed_forward
        entry = self.store.entries.get(self.tensor_name("text.layers.0.feed_forward.w1.weight"))
        if entry is not None and entry.shape == (text.other_feed_forward, text.hidden):
            width = decided(
                "the feed-forward width",
                width,
                entry.shape[0],
                "has another, as with the opposite block_auto_adjust_ff_dim",
            )
        return replace(
            config,
            projector=replace(projector, layernorm=norm, bias=bias),
            text=replace(text, conv_bias=conv_bias, feed_forward=width, tied_head=self._is_tied(text, decided)),
        )

    def _is_tied(self, text: TextConfig, decided: Callable[..., Any]) -> bool:
        """Whether the head is the embedding table."""
        head, table = self.tensor_name("head"), self.tensor_name("text.embed_tokens.weight")
        if head not in self.store:
            if text.tied_head is False:
                raise CheckpointError(
                    f"{self.folder}: config.json says tie_word_embeddings false, and the checkpoint has no {head}; "
                    "correct one of them"
                )
            return True
        if self.adapter and self.adapter.touches(head):
            return False
        shape = (text.vocabulary, text.hidden)
        if self.store.entries[head].shape != shape or self.store.entries[table].shape != shape:
            return False  # said with the shapes
        same = all(
            np.array_equal(a, b)
            for a, b in zip(self.store.chunks(head, shape), self.store.chunks(table, shape), strict=True)
        )
        if same:
            return True
        return bool(
            decided("tie_word_embeddings", bool(text.tied_head), False, f"has a {head} that is not the embedding table")
        )

    @cached_property
    def fingerprint(self) -> str:
        """Tells these weights from others: a hash over config.json and the whole weights. A fine-tune may differ in the
        middle of a file alone.
        """
        files = [*self.files, *([self.adapter.folder / ADAPTER_WEIGHTS] if self.adapter else [])]
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in files:
            digest.update(file_hash(file).encode())
        return digest.hexdigest()[:32]

    def tensor_name(self, place: str) -> str:
        """Return the name that a place such as `text.layers.0.ffn_norm.weight` has in the file."""
        if place == "head":
            return next((name for name in _HEAD if name in self.store), _HEAD[0])
        part, _, rest = place.partition(".")
        return self._prefix[part] + rest

    def read(self, place: str, *shape: int) -> Floats:
        """Return the tensor as float32 of `shape`, with the adapter merged in."""
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
