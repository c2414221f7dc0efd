"""manifest.json: what a bundle holds. Export and quantize write it, all read it; only this file knows its keys."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lfm_profiles import VARIANTS

from lfm_runtime.errors import BundleError
from lfm_runtime.formats.contract import GRAPHS, SCHEMA_VERSION, LayerKind, graph_file
from lfm_runtime.formats.files import read_json_object, to_json
from lfm_runtime.formats.typed import as_json, read_as

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
"""Of a packed bundle: names the manifest as well."""
SIGNATURE = f"{SUMS}.sig"
"""Of a signed one, over its SHA256SUMS."""
BESIDE_MANIFEST = frozenset({MANIFEST, SUMS, SIGNATURE})
"""The files of a bundle that its manifest cannot name."""
PROFILE = "profile.toml"
"""A profile that was packed with the bundle."""
TOOL = "lfm-edge"


@dataclass(frozen=True)
class File:
    """Size and SHA-256 of a file of the bundle."""

    bytes: int
    sha256: str  # hex

    @staticmethod
    def of(path: Path) -> File:
        """Return size and SHA-256 of the file at `path`, which is read whole."""
        return File(path.stat().st_size, file_hash(path))


@dataclass(frozen=True)
class Edge:
    """An input or output of a graph."""

    dtype: str | None  # FLOAT, INT64 …
    shape: tuple[int | str, ...]  # a name: free


@dataclass(frozen=True)
class GraphEntry:
    """A graph: what it is fed, what it gives, what it needs."""

    inputs: Mapping[str, Edge]
    outputs: Mapping[str, Edge]
    opset: int
    ir_version: int
    min_onnxruntime: str
    data: tuple[str, ...]  # files of weights that it reads


@dataclass(frozen=True)
class Source:
    """What the bundle was made of."""

    name: str
    revision: str | None  # the hub's commit
    license: str | None
    adapter: str | None
    weights: str  # tells these weights from others


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of the model that the graphs alone do not tell."""

    layers: tuple[LayerKind, ...]
    hidden: int
    kv_heads: int
    head_dim: int
    conv_kernel: int  # last axis of past_conv; genai's decoders keep one position less
    vocabulary: int
    context_length: int
    image_token_id: int
    feed_forward: int | None = None  # bundles of 0.1.0 before 2026-11 do not say


def _by_variant() -> Any:
    return field(default_factory=dict, metadata={"omitted": True})


@dataclass(frozen=True)
class Manifest:
    """The whole of it. File names are relative to the bundle, with slashes."""

    schema: int
    tool: Mapping[str, str]  # name, version, and those of what it used
    min_onnxruntime: str
    source: Source
    model: ModelFacts
    variants: Mapping[str, Mapping[str, str]]  # variant → graph stem → file
    graphs: Mapping[str, GraphEntry]  # by file
    files: Mapping[str, File]  # by name
    quantization: Mapping[str, Mapping[str, Any]] = _by_variant()  # how a variant was made
    quality: Mapping[str, Mapping[str, Any]] = _by_variant()  # how near it is to the one it was made of
    golden: Mapping[str, Mapping[str, Any]] = _by_variant()  # what it said where it was made: golden.py

    @staticmethod
    def read(folder: Path) -> Manifest | None:
        """The manifest of a bundle; None for a folder without one.

        Raises:
            BundleError: damaged, not ours, of a newer schema, or naming files outside the folder.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        raw = read_json_object(path, BundleError)
        schema = raw.get("schema")
        if type(schema) is not int or not isinstance(raw.get("variants"), dict):
            raise BundleError(
                f"{path} has no schema number or no variants; it is not a manifest of {TOOL}; copy it again"
            )
        if schema > SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema {schema}, this lfm-edge reads up to {SCHEMA_VERSION}; update lfm-edge"
            )
        found = read_as(Manifest, raw, path, BundleError, "copy or export the bundle again")
        found.check(path)
        return found

    @staticmethod
    def of(folder: Path) -> Manifest:
        """As `read`, for a folder that must have one.

        Raises:
            BundleError: it has none, or see `read`.
        """
        found = Manifest.read(folder)
        if found is None:
            raise BundleError(f"{folder} has no {MANIFEST}; make a bundle with: lfm-edge export")
        return found

    def check(self, path: Path) -> None:
        """Raise BundleError where it names nothing, or files outside the folder. `path`: for the message."""
        for key in ("variants", "files"):
            if not getattr(self, key):
                raise BundleError(f"{path} has no {key}; export the bundle again")
        facts = self.model
        for key in ("hidden", "kv_heads", "head_dim", "conv_kernel", "vocabulary", "context_length"):
            if getattr(facts, key) < 1:
                raise BundleError(f"{path}: model.{key} is {getattr(facts, key)}, allowed: 1 and above; copy it again")
        if not facts.layers or facts.image_token_id < 0 or self.schema < 1:
            raise BundleError(f"{path} has an impossible model or schema; copy or export the bundle again")
        releases = {f"graphs.{name}.min_onnxruntime": graph.min_onnxruntime for name, graph in self.graphs.items()}
        for key, release in {"min_onnxruntime": self.min_onnxruntime, **releases}.items():
            if not re.fullmatch(r"\d+(\.\d+)*", release):
                raise BundleError(f"{path}: {key} is {release!r}, not a version; export the bundle again")
        for variant, found in self.quality.items():
            if not isinstance(found.get("kl", 0.0), float | int | None):
                raise BundleError(f"{path}: quality.{variant}.kl is no number; quantize the variant again")
        for name in [*self.files, *(file for graphs in self.variants.values() for file in graphs.values())]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise BundleError(f"{path} names {name}, outside the bundle; do not use this bundle")
        for name in self._used():
            if name not in self.files:
                raise BundleError(f"{path} gives no size and hash of {name}; copy or export the bundle again")

    def _used(self) -> Iterator[str]:
        """Files that a variant or a graph names."""
        for graphs in self.variants.values():
            yield from graphs.values()
        for name, graph in self.graphs.items():
            yield from (name, *graph.data)

    def to_text(self) -> str:
        """Return the text of manifest.json."""
        return to_json(as_json(self), indent=2) + "\n"

    def write(self, folder: Path) -> None:
        """Write manifest.json into a folder that nobody else reads yet; the write is not atomic."""
        (folder / MANIFEST).write_text(self.to_text(), encoding="utf-8")

    @property
    def is_ours(self) -> bool:
        """Whether the manifest names lfm-edge as its writer."""
        return self.tool.get("name") == TOOL

    def weights_bytes(self, graph: str) -> int:
        """Return the bytes of all files of weights that a graph reads from."""
        return sum(self.files[name].bytes for name in self.graphs[graph].data)

    # ----------------------------------------------------------------------------------------- a changed manifest

    def only(self, variants: Sequence[str]) -> Manifest:
        """Return the manifest reduced to these variants, in this order."""
        graphs = {name for variant in variants for name in self.variants[variant].values()}
        weights = {name for graph in graphs for name in self.graphs[graph].data}
        kept = graphs | weights | {recipe_file(variant) for variant in variants}
        left_out = ("onnx/", "recipes/", "golden/")
        files = {n: file for n, file in self.files.items() if n in kept or not n.startswith(left_out)}
        files.pop(PROFILE, None)

        def chosen(entries: Mapping[str, Any]) -> dict[str, Any]:
            return {variant: entries[variant] for variant in variants if variant in entries}

        return replace(
            self,
            variants=chosen(self.variants),
            graphs={name: entry for name, entry in self.graphs.items() if name in graphs},
            files=files,
            quantization=chosen(self.quantization),
            quality=chosen(self.quality),
            golden=chosen(self.golden),
        )

    def of_whole_variants(self, folder: Path) -> Manifest:
        """Return the manifest without the variants that `folder` lacks a graph or weights of; as it is where all are
        there, or none.
        """

        def is_there(variant: str) -> bool:
            graphs = set(self.variants[variant].values())
            names = graphs.union(*(self.graphs[name].data for name in graphs if name in self.graphs))
            return all((folder / name).exists() for name in names)

        there = [variant for variant in self.variants if is_there(variant)]
        return self.only(there) if 0 < len(there) < len(self.variants) else self

    def with_files(self, files: Mapping[str, File]) -> Manifest:
        """Return the manifest with these files added or replaced."""
        return replace(self, files={**self.files, **files})

    def with_variant(
        self, variant: str, graphs: Mapping[str, str], described: Mapping[str, GraphEntry], folder: Path
    ) -> Manifest:
        """With a variant as it lies in `folder`, and no word on its quality yet. Variants over its files are gone, and
        what was measured of variants that use a file written anew is no longer said.

        Args:
            variant: its name.
            graphs: graph stem → file.
            described: the graphs that are new, by file.
            folder: has the files.
        """
        outdated = outdated_files(variant)
        written = {name for name in variant_files(variant) if (folder / name).exists()}
        files = {name: file for name, file in self.files.items() if name not in outdated}
        files |= {name: File.of(folder / name) for name in sorted(written)}
        gone = set(VARIANTS[variant].dependents)
        variants = {v: names for v, names in self.variants.items() if v not in gone} | {variant: graphs}
        stale = {v for v, names in variants.items() if v == variant or written.intersection(names.values())} | gone
        return replace(
            self,
            variants=variants,
            graphs={n: g for n, g in self.graphs.items() if n not in outdated} | dict(described),
            files=files,
            quantization={v: entry for v, entry in self.quantization.items() if v not in gone | {variant}},
            quality={v: entry for v, entry in self.quality.items() if v not in stale},
            golden={v: entry for v, entry in self.golden.items() if v not in stale},
        )


def variant_files(variant: str) -> set[str]:
    """Files that a variant may have of its own, the manifest excepted."""
    names = {graph_file(graph.stem, variant) for graph in GRAPHS}
    return names | {f"{name}_data" for name in names} | {recipe_file(variant)}


def outdated_files(variant: str) -> set[str]:
    """Files no longer true when a variant is written: its own, and those of the variants that use its weights."""
    return variant_files(variant).union(*map(variant_files, VARIANTS[variant].dependents))


def recipe_file(variant: str) -> str:
    """Where a variant's recipe lies in a bundle, to be read and to be given to --recipe."""
    return f"recipes/{variant}.toml"


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hashed(folder: Path, names: Iterable[str]) -> dict[str, File]:
    """Return size and SHA-256 of these files of a folder, which are read whole."""
    return {name: File.of(folder / name) for name in names}


def lost_seal(folder: Path) -> str:
    """What a bundle that was packed loses when a variant is written into it, in words; "" for one that was not."""
    if not (folder / SUMS).exists():
        return ""
    lost = f"{SUMS} and its signature" if (folder / SIGNATURE).exists() else SUMS
    return f"{folder} was packed; {lost} will not be true of it any more and goes: pack it again"


def unlike_sums(folder: Path, files: Mapping[str, File]) -> list[str]:
    """What SHA256SUMS, which names the manifest as well, says differently of these files; each a message. Bundles that
    were never packed have none.
    """
    path = folder / SUMS
    if not path.exists():
        return []
    said: dict[str, str] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            digest, name = line.split("  ", 1)
            said[name] = digest
    except ValueError:
        return [f"{SUMS} is damaged; copy the bundle again"]
    wanted = {name: entry.sha256 for name, entry in files.items()} | {MANIFEST: file_hash(folder / MANIFEST)}
    names = sorted(name for name in wanted.keys() | said.keys() if wanted.get(name) != said.get(name))
    return [f"{name} is not what {SUMS} says; copy the bundle again" for name in names]
