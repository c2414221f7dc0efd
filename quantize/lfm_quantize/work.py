"""The finished blocks of a run, kept beside the bundle until it is done, so that a killed run goes on after the last of
them.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lfm_quantize.graph import DAMAGE, QuantizeError, Tensor
from lfm_quantize.layer import Change
from lfm_quantize.recipe import Recipe


class Work:
    """`.NAME.VARIANT-work` beside the bundle; one run at a time, of one recipe, source and calibration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    @contextmanager
    def open(bundle: Path, variant: str, key: Mapping[str, Any]) -> Iterator[Work]:
        """Go on in the folder an equal run left, or start a new one.

        Raises:
            QuantizeError: another run is at it.
        """
        bundle = bundle.resolve()
        folder = bundle.parent / f".{bundle.name}.{variant}-work"
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise QuantizeError(f"another run is making {variant} of {bundle}; wait for it to end") from e
            digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
            mark = folder / "key"
            if not mark.exists() or mark.read_text() != digest:
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                mark.write_text(digest)
            yield Work(folder)
        finally:
            os.close(descriptor)

    def recipe(self) -> Recipe | None:
        """The recipe that a search found before."""
        place = self.folder / "recipe.toml"
        return Recipe.read(place) if place.exists() else None

    def keep_recipe(self, recipe: Recipe) -> None:
        """Keep a recipe that was searched for."""
        partial = self.folder / "recipe.toml.partial"
        partial.write_text(recipe.to_toml(), encoding="utf-8")
        partial.replace(self.folder / "recipe.toml")

    def load(self, block: str) -> Change | None:
        """A block finished before; its arrays stay in their files."""
        place = self.folder / block
        if not (place / "change.json").exists():
            return None
        try:
            raw = json.loads((place / "change.json").read_text())
            nodes = {
                name: [onnx.NodeProto.FromString(base64.b64decode(n)) for n in found]
                for name, found in raw["nodes"].items()
            }
            tensors = {
                name: Tensor(np.load(place / f"{i}.npy", mmap_mode="r"), entry["dtype"], tuple(entry["shape"]))
                for i, (name, entry) in enumerate(raw["tensors"].items())
            }
            return Change(nodes, tensors, raw["layers"])
        except DAMAGE:  # the block is made again
            shutil.rmtree(place)
            return None

    def save(self, block: str, change: Change) -> None:
        """Keep a finished block; its arrays move from memory to files."""
        place = self.folder / block
        if (place / "change.json").exists():
            return
        place.mkdir(exist_ok=True)
        for i, (name, tensor) in enumerate(change.tensors.items()):
            np.save(place / f"{i}.npy", tensor.data)
            data = np.load(place / f"{i}.npy", mmap_mode="r") if tensor.data.size else tensor.data
            change.tensors[name] = Tensor(data, tensor.dtype, tensor.shape)
        raw = {
            "nodes": {
                name: [base64.b64encode(n.SerializeToString()).decode() for n in found]
                for name, found in change.nodes.items()
            },
            "tensors": {name: {"dtype": t.dtype, "shape": t.shape} for name, t in change.tensors.items()},
            "layers": change.layers,
        }
        partial = place / "change.json.partial"
        partial.write_text(json.dumps(raw))
        partial.replace(place / "change.json")

    def finished(self) -> None:
        """The variant is in the bundle: nothing of this is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)
