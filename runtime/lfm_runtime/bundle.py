"""A bundle folder opened: which file is which graph of which variant, checked against the manifest.

Two kinds of folder: one of ours, with manifest.json; or one with only the hub's files, where graphs are found by name. No
onnxruntime here: a bundle can be looked at on a machine that could not run it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm_runtime.contract import DECODER, EMBED_TOKENS, GRAPHS, SCHEMA_VERSION, VARIANT_SUFFIX, VISION_ENCODER, Graph
from lfm_runtime.errors import BundleError
from lfm_runtime.images import ImageSettings
from lfm_runtime.prompt import PromptSpec, compile_on_device
from lfm_runtime.sampling import GenerationSettings

MANIFEST = "manifest.json"
HASHED_AT_LOAD = 32 << 20
"""Files up to this size are hashed at every load; larger ones only by size, because hashing 1 GB takes seconds on a Pi."""


@dataclass(frozen=True)
class Bundle:
    """Where everything lies. `files` is empty for a hub folder: nothing is known to check against."""

    folder: Path
    variants: Mapping[str, Mapping[str, Path]]  # variant → graph stem → .onnx file
    files: Mapping[str, Mapping[str, Any]]  # relative path → {"sha256", "bytes"}
    context_length: int
    eos: tuple[int, ...]
    prompt: PromptSpec
    images: ImageSettings
    generation: GenerationSettings

    @staticmethod
    def open(folder: Path) -> Bundle:
        """Read what describes the bundle; graphs are looked for but not loaded.

        Raises:
            BundleError: not a bundle, damaged, or of a newer schema.
        """
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder; make a bundle with: lfm-edge export CHECKPOINT -o {folder}")
        manifest = _manifest(folder)
        generation = _json(folder / "generation_config.json", required=False)
        config = _json(folder / "config.json", required=manifest is None)
        text = config.get("text_config") or {}
        if manifest is None:
            variants, files = _hub_variants(folder), {}
            context = int(text.get("max_position_embeddings", 32768))
        else:
            variants = {
                name: {stem: folder / file for stem, file in graphs.items()} for name, graphs in manifest["variants"].items()
            }
            files, context = manifest["files"], int(manifest["model"]["context_length"])
            _check_files(folder, files)
        has_prompt = manifest is not None or (folder / "prompt.json").exists()
        eos = generation.get("eos_token_id", text.get("eos_token_id", 7))
        return Bundle(
            folder, variants, files, context, tuple(eos) if isinstance(eos, list) else (int(eos),),
            PromptSpec.load(folder / "prompt.json") if has_prompt else compile_on_device(folder),
            ImageSettings.from_folder(folder), GenerationSettings.from_config(generation),
        )  # fmt: skip

    def graphs(self, variant: str | None) -> tuple[str, Mapping[str, Path]]:
        """(variant, its files by stem); None takes the first the bundle names.

        Raises:
            BundleError: the bundle lacks the variant or one of its graphs; says which it has.
        """
        name = variant or next(iter(self.variants))
        if name not in self.variants:
            raise BundleError(f"{self.folder} has no variant {name!r}; it has {', '.join(self.variants)}")
        graphs = self.variants[name]
        for graph in GRAPHS:
            if graph.stem not in graphs or not graphs[graph.stem].exists():
                raise BundleError(
                    f"{self.folder}: variant {name} has no {graph.stem}; create it with: lfm-edge export --graphs {graph.stem}"
                )
        return name, graphs

    def verify(self) -> None:
        """Hash every file the manifest names.

        Raises:
            BundleError: naming the first file that differs.
        """
        for name, wanted in self.files.items():
            _check_hash(self.folder / name, wanted["sha256"])


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = _json(path)
    schema = manifest.get("schema")
    if not isinstance(schema, int):
        raise BundleError(f"{path} has no schema number; it is not a manifest of lfm-edge")
    if schema > SCHEMA_VERSION:
        raise BundleError(f"{path} has schema {schema}, this lfm-edge reads up to {SCHEMA_VERSION}; update lfm-edge")
    for key in ("variants", "files", "model"):
        if not isinstance(manifest.get(key), dict) or not manifest[key]:
            raise BundleError(f"{path} has no {key}; export the bundle again")
    for name in [*manifest["files"], *(f for graphs in manifest["variants"].values() for f in graphs.values())]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BundleError(f"{path} names {name}, outside the bundle; do not use this bundle")
    return manifest


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, wanted in files.items():
        path = folder / name
        if not path.exists():
            raise BundleError(f"{path} is missing; the manifest names it: copy the bundle again or export it again")
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise BundleError(f"{path} has {size} bytes, the manifest says {wanted['bytes']}: copy the bundle again")
        if size <= HASHED_AT_LOAD:
            _check_hash(path, wanted["sha256"])


def _check_hash(path: Path, wanted: str) -> None:
    if file_hash(path) != wanted:
        raise BundleError(f"{path} is damaged (its SHA-256 is not the manifest's); copy the bundle again")


def file_hash(path: Path) -> str:
    """SHA-256, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hub_variants(folder: Path) -> dict[str, dict[str, Path]]:
    """Graphs by the names hub repositories use, in onnx/ or beside config.json."""
    places = [place for place in (folder / "onnx", folder) if place.is_dir()]
    variants: dict[str, dict[str, Path]] = {}
    for variant, suffix in VARIANT_SUFFIX.items():
        found = {graph.stem: path for graph in GRAPHS if (path := _find(places, graph, suffix)) is not None}
        if {DECODER.stem, VISION_ENCODER.stem, EMBED_TOKENS.stem} <= set(found):
            variants[variant] = found
    if not variants:
        raise BundleError(
            f"{folder} is not a bundle: no manifest.json, and no set of vision_encoder, embed_tokens and decoder_model_merged "
            "graphs; make a bundle with: lfm-edge export"
        )
    return variants


def _find(places: list[Path], graph: Graph, suffix: str) -> Path | None:
    candidates = (place / f"{name}{suffix}.onnx" for place in places for name in graph.aliases)
    return next((path for path in candidates if path.exists()), None)


def _json(path: Path, *, required: bool = True) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        if not required:
            return {}
        raise BundleError(f"{path} is missing; make a bundle with: lfm-edge export") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise BundleError(f"{path} is damaged ({e}); copy or export the bundle again") from e
    if not isinstance(value, dict):
        raise BundleError(f"{path} holds no JSON object; copy or export the bundle again")
    return value
