"""Graphs optimized for this processor, with their weights in the layout its kernels want, on disk: they are mapped
instead of made anew in anonymous memory at every start.

They lie beside the bundle, `NAME.prepared/KEY/GRAPH/`, KEY made of the onnxruntime version and the processor's
features. Each GRAPH folder appears whole or not at all, and says in prepared.json what it was made from. One that does
not fit is not used, and `find` tells why. Threads do not change the layout.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
from lfm_profiles import cpu_features

from lfm_runtime.bundle import HASHED_AT_LOAD, Bundle
from lfm_runtime.errors import BundleError, command
from lfm_runtime.formats.files import read_json_object
from lfm_runtime.formats.manifest import file_hash

NOTE = "prepared.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """Where to load a graph from, and what the user should know when that is not a prepared one that was there."""

    path: Path
    note: str | None = None
    damaged: bool = False  # what was prepared is not what prepare wrote


def folder_of(bundle: Path) -> Path:
    """Return the folder for graphs prepared by this onnxruntime for this processor."""
    bundle = bundle.resolve()
    key = hashlib.sha256(" ".join(cpu_features()).encode()).hexdigest()[:12]
    return bundle.with_name(f"{bundle.name}.prepared") / f"onnxruntime-{ort.__version__}-{key}"


def find(bundle: Bundle, source: Path, *, verify: bool = False) -> Found:
    """The prepared form of a graph where there is one that fits; else the graph itself."""
    place = folder_of(bundle.folder) / source.stem
    if not place.is_dir():
        others = place.parent.parent.glob(f"*/{source.stem}")
        if any(others):
            return Found(
                source, f"{place.parent.parent} was prepared for another processor or onnxruntime and is not used"
            )
        return Found(source)
    try:
        note = read_json_object(place / NOTE, BundleError)
        if note["source"] != bundle.fingerprint(source):
            return Found(source, f"{place} was prepared from an older {source.name} and is not used")
        if {path.name for path in place.iterdir()} - {NOTE} != set(note["files"]):
            return Found(source, f"{place} has other files than its {NOTE} names and is not used", damaged=True)
        for name, wanted in note["files"].items():
            path = place / name
            if path.stat().st_size != wanted["bytes"]:
                return Found(source, f"{path} is cut off and not used", damaged=True)
            if (verify or wanted["bytes"] <= HASHED_AT_LOAD) and file_hash(path) != wanted["sha256"]:
                return Found(source, f"{path} is damaged and not used", damaged=True)
    except (BundleError, OSError, KeyError, TypeError, AttributeError):
        return Found(source, f"{place / NOTE} is missing or damaged, so what was prepared is not used", damaged=True)
    return Found(place / source.name)


def outdated(bundle: Bundle) -> list[Path]:
    """What is prepared for this machine of graphs that the bundle does not have, or has otherwise now."""
    graphs = {path.stem: path for paths in bundle.variants.values() for path in paths.values()}
    found = []
    for note in folder_of(bundle.folder).glob(f"*/{NOTE}"):
        source = graphs.get(note.parent.name)
        with suppress(BundleError, KeyError):
            if source is None or read_json_object(note, BundleError)["source"] != bundle.fingerprint(source):
                found.append(note.parent)
    return found


def tell_of_damage(bundle: Bundle) -> None:
    """Before a long measurement: remove what is damaged of all that was prepared, with a warning for each."""
    for said in remove_damaged(bundle, [path for graphs in bundle.variants.values() for path in graphs.values()]):
        _log.warning("lfm-edge: %s", said)


def remove_damaged(bundle: Bundle, sources: Iterable[Path]) -> list[str]:
    """Hash everything that was prepared from `sources` for this processor, and remove what is damaged, so that nothing
    is answered from it. Returns a message for each, with the command that makes it again.
    """
    said = []
    for source in dict.fromkeys(sources):
        place = folder_of(bundle.folder) / source.stem
        found = find(bundle, source, verify=True)
        if not found.damaged:
            continue
        try:
            shutil.rmtree(place)
            did = "it was removed"
        except OSError as e:
            did = f"remove {place} ({e.strerror or e})"
        variant = next(name for name, graphs in bundle.variants.items() if source in graphs.values())
        again = command("prepare", bundle.folder, "--variant", variant)
        said.append(f"{found.note}: {did}; make it again: {again}")
    return said
