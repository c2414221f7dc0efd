"""The finished blocks of a run, kept beside the bundle until it is done, so that a killed run goes on after the last of
them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from lfm_runtime.formats.files import to_write

from lfm_quantize.calibrate.block import Change
from lfm_quantize.graph import DAMAGE, Array, QuantizeError
from lfm_quantize.passes.integers import Product
from lfm_quantize.recipe import Recipe
from lfm_quantize.rounding import Precision, Rounded


def work_folder(bundle: Path, variant: str) -> Path:
    """Return the folder that a run leaves behind when it is interrupted: the next one goes on there."""
    bundle = bundle.resolve()
    return bundle.parent / f".{bundle.name}.{variant}-work"


class Work:
    """`.NAME.VARIANT-work` beside the bundle; one run at a time, of one recipe, source and calibration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    @contextmanager
    def open(bundle: Path, variant: str, key: Mapping[str, Any]) -> Iterator[Work]:
        """Go on in the folder an equal run left, or start a new one.

        Raises:
            QuantizeError: another run is at it, or the folder cannot be made.
        """
        folder = work_folder(bundle, variant)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as e:
            raise QuantizeError(
                f"{folder.parent} cannot be written ({e.strerror}), where a run keeps its work; "
                + to_write(folder.parent)
            ) from e
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
            try:
                yield Work(folder)
            finally:
                if {path.name for path in folder.glob("*")} == {"key"}:  # nothing to go on from
                    shutil.rmtree(folder, ignore_errors=True)
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
        """A block finished before; its arrays stay in their files. None where there is none, or a damaged one."""
        place = self.folder / block
        if not (place / "change.json").exists():
            return None
        try:
            return _read(place, json.loads((place / "change.json").read_text()))
        except DAMAGE:  # the block is made again
            shutil.rmtree(place)
            return None

    def save(self, block: str, change: Change) -> Change:
        """Keep a finished block; returns it with its arrays in files instead of memory."""
        place = self.folder / block
        if (place / "change.json").exists():
            return change
        place.mkdir(exist_ok=True)
        raw = {
            "products": {
                name: {
                    "precision": asdict(product.rounded.precision),
                    "negative": product.negative,
                    "zero_points": product.rounded.zero_points is not None,
                }
                for name, product in change.products.items()
            },
            "constants": list(change.constants),
            "layers": change.layers,
            "attentions": change.attentions,
        }
        for i, product in enumerate(change.products.values()):
            for part in _PARTS:
                array = getattr(product.rounded, part)
                if array is not None:
                    np.save(place / f"{i}.{part}.npy", array)
        for i, array in enumerate(change.constants.values()):
            np.save(place / f"constant.{i}.npy", array)
        partial = place / "change.json.partial"
        partial.write_text(json.dumps(raw))
        partial.replace(place / "change.json")
        return _read(place, raw)

    def finished(self) -> None:
        """The variant is in the bundle: nothing of this is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


_PARTS = ("codes", "scales", "zero_points")


def _read(place: Path, raw: Mapping[str, Any]) -> Change:
    def array(name: str) -> Array:
        loaded: Array = np.load(place / f"{name}.npy", mmap_mode="r")
        return loaded

    products = {}
    for i, (name, entry) in enumerate(raw["products"].items()):
        zero_points = array(f"{i}.zero_points") if entry["zero_points"] else None
        rounded = Rounded(array(f"{i}.codes"), array(f"{i}.scales"), zero_points, Precision(**entry["precision"]))
        products[name] = Product(rounded, entry["negative"])
    constants = {name: array(f"constant.{i}") for i, name in enumerate(raw["constants"])}
    return Change(products, constants, raw["layers"], raw["attentions"])
