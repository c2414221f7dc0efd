"""A variant's files in a bundle: where they lie, how they are written, what the manifest says of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lfm_profiles import VARIANTS
from lfm_runtime.bundle import MANIFEST, Bundle, file_hash, read_manifest
from lfm_runtime.errors import BundleError
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, VISION_ENCODER, graph_file
from lfm_runtime.formats.files import to_json
from lfm_runtime.formats.writer import carry_over, replacing

from lfm_quantize.graph import Graph, Place, QuantizeError
from lfm_quantize.kv import FIRST_ONNXRUNTIME
from lfm_quantize.quality import Quality
from lfm_quantize.rewrite import TABLE
from lfm_quantize.source import Source, look_up

Graphs = dict[str, "Graph | str"]
"""Stem → a new graph, or the file of one that is there."""


def variant_files(variant: str) -> set[str]:
    """Files a variant may write."""
    names = {graph_file(graph.stem, variant) for graph in (VISION_ENCODER, EMBED_TOKENS, DECODER)}
    return names | {f"{name}_data" for name in names} | {recipe_file(variant), MANIFEST}


def outdated_files(variant: str) -> set[str]:
    """Files no longer true when a variant is written: its own, and those of the variants that use its weights."""
    return variant_files(variant).union(*map(variant_files, VARIANTS[variant].dependents))


def recipe_file(variant: str) -> str:
    """Where a variant's recipe lies in a bundle, to be read and to be given to --recipe."""
    return f"recipes/{variant}.toml"


def save_graphs(folder: Path, variant: str, graphs: Graphs, source: Source) -> None:
    """Write the graphs that are new. A head tied to the embedding table points into the table's file."""
    places: dict[str, Place] = {}
    for stem in (VISION_ENCODER.stem, EMBED_TOKENS.stem, DECODER.stem):
        graph = graphs[stem]
        if isinstance(graph, str):
            continue
        if stem == DECODER.stem and source.tied:
            same = {n: n for n in places if n.startswith(TABLE)} | {source.head: look_up(source.embed).input[0]}
            graph.tensors = {
                n: replace(t, place=places[same[n]])
                if n in same and same[n] in places and places[same[n]].size == t.array.nbytes
                else t
                for n, t in graph.tensors.items()
            }
        written = graph.save(folder / graph_file(stem, variant))
        places = written if stem == EMBED_TOKENS.stem else places


def write_manifest(
    folder: Path, old: dict[str, Any], variant: str, start: str, graphs: Graphs, record: dict[str, Any]
) -> None:
    """The old manifest with a variant's files and how they were made, and no word on its quality yet."""
    manifest = json.loads(json.dumps(old))
    written = {name for name in variant_files(variant) if name != MANIFEST and (folder / name).exists()}
    manifest["files"] = {n: e for n, e in old["files"].items() if n not in outdated_files(variant)}
    manifest["files"] |= {
        n: {"bytes": (folder / n).stat().st_size, "sha256": file_hash(folder / n)} for n in sorted(written)
    }
    for key in ("variants", "quantization", "quality", "golden"):
        for dependent in VARIANTS[variant].dependents:
            manifest.get(key, {}).pop(dependent, None)
    manifest["graphs"] = {n: e for n, e in old["graphs"].items() if n not in outdated_files(variant)}
    names = {stem: graph if isinstance(graph, str) else graph_file(stem, variant) for stem, graph in graphs.items()}
    manifest["variants"][variant] = names
    for stem, graph in graphs.items():
        if isinstance(graph, Graph):
            described = {**old["graphs"][graph_file(stem, start)], **graph.edges()}
            data = sorted(f"onnx/{file}" for file in graph.data_files(Path(names[stem]).name))
            manifest["graphs"][names[stem]] = {**described, "data": data}
            if VARIANTS[variant].keys == "int8":
                manifest["graphs"][names[stem]]["min_onnxruntime"] = FIRST_ONNXRUNTIME
    manifest.setdefault("quantization", {})[variant] = record
    # What was measured of variants that use a file written anew is no longer true.
    stale = [v for v, files in manifest["variants"].items() if v == variant or written.intersection(files.values())]
    for key in ("quality", "golden"):
        manifest[key] = {v: known for v, known in manifest.get(key, {}).items() if v not in stale}
    (folder / MANIFEST).write_text(to_json(manifest, indent=2) + "\n", encoding="utf-8")


def add_quality(folder: Path, quality: Quality) -> None:
    """Write the numbers into the manifest of a folder that nobody else writes."""
    manifest = read_manifest(folder) or {}
    manifest.setdefault("quality", {})[quality.variant] = quality.to_dict()
    (folder / MANIFEST).write_text(to_json(manifest, indent=2) + "\n", encoding="utf-8")


def keep_quality(folder: Path, quality: Quality) -> str | None:
    """Write the numbers into a bundle's manifest; returns why they could not be, for a folder that is not ours or
    cannot be written.
    """
    folder = folder.resolve()
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{folder} has no manifest.json to keep the numbers in"
    try:
        with replacing(folder) as new:
            files = (read_manifest(folder) or manifest)["files"]
            carry_over(folder, new, files)
            shutil.copyfile(folder / MANIFEST, new / MANIFEST)  # not a link: this one changes
            add_quality(new, quality)
    except BundleError as e:
        return f"the numbers are not kept: {e}"
    return None


def check_size(folder: Path, variant: str, megabytes: float) -> None:
    """Raise QuantizeError when a variant's graphs are larger than was asked for."""
    size = sum(
        (folder / name).stat().st_size
        for name in variant_files(variant)
        if name.startswith("onnx/") and (folder / name).exists()
    )
    if size > megabytes * 1e6:
        raise QuantizeError(
            f"the files came out at {size / 1e6:.2f} MB, --max-size is {megabytes:g}; the bundle is as before: ask "
            "for less"
        )


def check_space(folder: Path, bundle: Bundle, start: str) -> None:
    """Raise QuantizeError without room for the work folder and the new files: a third of the weights each, roughly."""
    weights = sum(
        int(e["bytes"]) for n, e in bundle.files.items() if n.startswith("onnx/") and n in variant_files(start)
    )
    free, wanted = shutil.disk_usage(folder.resolve().parent).free, int(weights * 0.7)
    if free < wanted:
        raise QuantizeError(
            f"{folder.resolve().parent} has {free >> 20} MiB free, quantizing needs about {wanted >> 20}; make room"
        )
