"""A variant's files in a bundle: where they lie, how they are written, what the manifest says of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lfm_profiles import VARIANTS
from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import BundleError
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, VISION_ENCODER, graph_file
from lfm_runtime.formats.manifest import MANIFEST, Manifest, variant_files
from lfm_runtime.formats.writer import carry_over, replacing

from lfm_quantize.graph import Graph, Place, QuantizeError
from lfm_quantize.passes.kv import FIRST_ONNXRUNTIME
from lfm_quantize.passes.rewrite import TABLE
from lfm_quantize.quality import Quality
from lfm_quantize.source import Source, look_up

Graphs = dict[str, "Graph | str"]
"""Stem → a new graph, or the file of one that is there."""


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


def with_graphs(
    old: Manifest, folder: Path, variant: str, start: str, graphs: Graphs, record: Mapping[str, Any]
) -> Manifest:
    """The old manifest with a variant's files and how they were made, and no word on its quality yet."""
    names = {stem: graph if isinstance(graph, str) else graph_file(stem, variant) for stem, graph in graphs.items()}
    described = {}
    for stem, graph in graphs.items():
        if isinstance(graph, Graph):
            entry = old.graphs[graph_file(stem, start)]
            data = sorted(f"onnx/{file}" for file in graph.data_files(Path(names[stem]).name))
            first = FIRST_ONNXRUNTIME if VARIANTS[variant].keys == "int8" else entry.min_onnxruntime
            inputs, outputs = graph.edges()
            described[names[stem]] = replace(
                entry, inputs=inputs, outputs=outputs, data=tuple(data), min_onnxruntime=first
            )
    manifest = old.with_variant(variant, names, described, folder)
    return replace(manifest, quantization={**manifest.quantization, variant: record})


def with_quality(manifest: Manifest, quality: Quality) -> Manifest:
    """With the numbers of a variant."""
    return replace(manifest, quality={**manifest.quality, quality.variant: quality.to_dict()})


def keep_quality(folder: Path, quality: Quality) -> str | None:
    """Write the numbers into a bundle's manifest; returns why they could not be, for a folder that is not ours or
    cannot be written.
    """
    folder = folder.resolve()
    if Manifest.read(folder) is None:
        return f"{folder} has no {MANIFEST} to keep the numbers in"
    try:
        with replacing(folder) as new:
            manifest = Manifest.of(folder)
            carry_over(folder, new, manifest.files)
            with_quality(manifest, quality).write(new)
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
    weights = sum(e.bytes for n, e in bundle.files.items() if n.startswith("onnx/") and n in variant_files(start))
    free, wanted = shutil.disk_usage(folder.resolve().parent).free, int(weights * 0.7)
    if free < wanted:
        raise QuantizeError(
            f"{folder.resolve().parent} has {free >> 20} MiB free, quantizing needs about {wanted >> 20}; make room"
        )
