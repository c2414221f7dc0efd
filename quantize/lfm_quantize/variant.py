"""A variant's files in a bundle: where they lie, how they are written, what the manifest says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from lfm_profiles import FINEST, VARIANTS
from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import BundleError, counted
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, VISION_ENCODER, graph_file
from lfm_runtime.formats.files import check_room
from lfm_runtime.formats.manifest import MANIFEST, SUMS, File, Manifest, file_hash, variant_files
from lfm_runtime.formats.writer import carry_over, replacing

from lfm_quantize.graph import QuantizeError, edges, save
from lfm_quantize.judge.quality import Quality
from lfm_quantize.passes.integers import TABLE
from lfm_quantize.passes.kv import FIRST_ONNXRUNTIME
from lfm_quantize.passes.table import look_up
from lfm_quantize.source import Source

_MARK = 16


@dataclass(frozen=True)
class NewGraph:
    """A graph that is to be written. With `over`, its constants that lie in another variant's files stay there."""

    model: ir.Model
    over: bool = False


VariantGraphs = dict[str, "NewGraph | str"]
"""Stem → a new graph, or the file of one that is there."""
Files = Mapping[str, list[str]]
"""Stem → the data files of a new graph, in `onnx`."""


def save_graphs(folder: Path, variant: str, graphs: VariantGraphs, source: Source) -> Files:
    """Write the graphs that are new; a head tied to the embedding table points into the table's file. Returns each
    one's data files by stem.
    """
    table: dict[str, ir.ExternalTensor] = {}
    files = {}
    for stem in (VISION_ENCODER.stem, EMBED_TOKENS.stem, DECODER.stem):
        graph = graphs[stem]
        if isinstance(graph, str):
            continue
        shared = {}
        if stem == DECODER.stem and source.tied:
            same = {name: name for name in table if name.startswith(TABLE)}
            same[source.head] = str(look_up(source.embed).inputs[0].name)  # type: ignore[union-attr]
            for name, value in graph.model.graph.initializers.items():
                place = table.get(same.get(name, ""))
                if place is not None and value.const_value is not None and place.length == value.const_value.nbytes:
                    shared[name] = place
        written = save(graph.model, folder / graph_file(stem, variant), shared, over=graph.over)
        files[stem] = written.files
        if stem == EMBED_TOKENS.stem:
            table = dict(written.places)
    return files


def with_graphs(old: Manifest, folder: Path, variant: str, start: str, graphs: VariantGraphs, files: Files) -> Manifest:
    """The old manifest with a variant's files, and no word on its quality yet.

    Args:
        old: of the bundle.
        folder: where the files are.
        variant: its name.
        start: the variant it was made of, whose edges it has but for types.
        graphs: what `save_graphs` wrote.
        files: what it returned.
    """
    names = {stem: g if isinstance(g, str) else graph_file(stem, variant) for stem, g in graphs.items()}
    described = {}
    for stem, graph in graphs.items():
        if isinstance(graph, NewGraph):
            entry = old.graphs[graph_file(stem, start)]
            data = tuple(f"onnx/{file}" for file in files[stem])
            first = FIRST_ONNXRUNTIME if VARIANTS[variant].keys == "int8" else entry.min_onnxruntime
            inputs, outputs = edges(graph.model)
            described[names[stem]] = replace(entry, inputs=inputs, outputs=outputs, data=data, min_onnxruntime=first)
    return old.with_variant(variant, names, described, folder)


def with_quality(manifest: Manifest, quality: Quality) -> Manifest:
    """With the numbers of a variant."""
    return replace(manifest, quality={**manifest.quality, quality.variant: quality.to_dict()})


def calibration_marks(images: Iterable[Path]) -> list[str]:
    """By which images are known again: the beginnings of their files' SHA-256."""
    return sorted({file_hash(image)[:_MARK] for image in set(images)})


def keep_quality(folder: Path, quality: Quality, images: Iterable[Path], measured: Manifest | None) -> str | None:
    """Write the numbers into a bundle's manifest; returns why they are not: they say nothing about the loss to the
    float weights on other `images` than those that calibrated, or less than those that are there; the folder is packed,
    not ours, cannot be written, or has other weights than when its manifest was `measured`.
    """
    folder = folder.resolve()
    there = Manifest.read(folder)
    if there is None or measured is None:
        return f"{folder} has no {MANIFEST} to keep the numbers in"
    for variant in (quality.variant, quality.against):
        if _weights(there, variant) != _weights(measured, variant):
            return f"the numbers are not kept: {variant} was made anew meanwhile, and they are of the one before"
    if seen := seen_before(there, quality.variant, images):
        return f"{seen}; the numbers are not kept"
    if quality.against not in FINEST or quality.against == quality.variant:
        kept, these = f"{MANIFEST} has the loss to {' or '.join(FINEST)}", quality.against
        these = "the variant itself" if these == quality.variant else these
        return f"the numbers are not kept: {kept}, these are to {these}"
    if (folder / SUMS).exists():
        return f"the numbers are not kept: {folder} was packed, and its {SUMS} names {MANIFEST}; judge before packing"
    if better := _better(there.quality.get(quality.variant, {}), quality):
        return f"the numbers are not kept: {MANIFEST} has {better}"
    try:
        with replacing(folder, elsewhere=False) as new:
            manifest = Manifest.of(folder)
            carry_over(folder, new, manifest.files)
            with_quality(manifest, quality).write(new)
    except BundleError as e:
        return f"the numbers are not kept: {e}"
    return None


def seen_before(manifest: Manifest, variant: str, images: Iterable[Path]) -> str | None:
    """That some of the images calibrated a variant; None where none did."""
    marks = calibration_marks(images)
    known = _calibrated(manifest, variant).intersection(marks)
    few = f"{len(known)} of {counted(len(marks), 'image')} calibrated {variant}"
    return f"{few}, so that its loss on others is larger" if known else None


def _weights(manifest: Manifest, variant: str) -> dict[str, File]:
    names = variant_files(variant)
    return {name: file for name, file in manifest.files.items() if name in names}


def _calibrated(manifest: Manifest, variant: str) -> set[str]:
    """Marks of the images that calibrated a variant, or those whose weights it uses; releases before kept none."""
    found: set[str] = set()
    for name in (variant, *VARIANTS[variant].bases):
        used = manifest.quantization.get(name, {}).get("calibration")
        marks = used.get("sha256") if isinstance(used, dict) else None
        found.update(mark for mark in (marks if isinstance(marks, list) else ()) if isinstance(mark, str))
    return found


def _better(known: Mapping[str, Any], quality: Quality) -> str:
    """What the numbers that are known have more than these; "" where they have not."""
    against, questions = known.get("against"), known.get("questions", 0)
    if against not in FINEST:
        return ""
    if FINEST.index(against) < FINEST.index(quality.against):
        return f"those against {against}, these are against {quality.against}"
    if against == quality.against and questions > quality.questions:
        return f"those of {questions} questions, these are of {quality.questions}"
    return ""


def check_size(folder: Path, variant: str, megabytes: float) -> None:
    """Raise QuantizeError when a variant's graphs are larger than was asked for."""
    size = sum(
        (folder / name).stat().st_size
        for name in variant_files(variant)
        if name.startswith("onnx/") and (folder / name).exists()
    )
    if size > megabytes * 1e6:
        raise QuantizeError(
            f"the files have {size / 1e6:.2f} MB, more than --max-size {megabytes:g}; the bundle is unchanged: "
            "try a smaller --max-size"
        )


def check_space(folder: Path, bundle: Bundle, start: str) -> None:
    """Raise QuantizeError without room for the work folder and the new files: a third of the weights each, roughly."""
    weights = sum(e.bytes for n, e in bundle.files.items() if n.startswith("onnx/") and n in variant_files(start))
    check_room(folder.resolve().parent, int(weights * 0.7), "quantizing", QuantizeError)
