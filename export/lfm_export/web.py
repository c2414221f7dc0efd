"""A bundle for browsers. A browser's session sees no data file but its graph's own, so a decoder whose head is tied to
the embedding table gets a copy of it; and it fetches every output, so what the convolutions read goes, which only
speculation needs. Such a bundle runs here as well.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from lfm_runtime.bundle import Bundle, complete_for_clients
from lfm_runtime.formats.contract import CONV_INPUT, DECODER
from lfm_runtime.formats.manifest import File, Manifest
from lfm_runtime.formats.writer import carry_over, check_replaceable, replacing

from lfm_export.builder import DataFile
from lfm_export.checkpoint.config import CheckpointError
from lfm_export.manifest import described

VARIANTS = ("fp32", "fp16", "int8", "int4")
"""What transformers.js knows by the names of their files."""


def write_web(folder: Path, output: Path) -> list[str]:
    """Write a bundle for browsers; returns the names of its variants.

    Args:
        folder: a bundle of ours.
        output: the folder to write; a bundle that is there is replaced.

    Raises:
        BundleError: not a bundle of ours, or the output cannot be written.
        CheckpointError: it has no variant for browsers, or the output is the bundle itself.
    """
    if output.resolve() == folder.resolve():
        raise CheckpointError(f"{output} is the bundle itself; choose another output")
    bundle, manifest = Bundle.open(folder), Manifest.of(folder)
    variants = [variant for variant in manifest.variants if variant in VARIANTS]
    if not variants:
        raise CheckpointError(f"{folder} has no variant for browsers; they take {', '.join(VARIANTS)}")
    kept = manifest.only(variants)
    decoders = {names[DECODER.stem]: bundle.graphs(v)[1][DECODER.stem] for v, names in kept.variants.items()}
    theirs = {data for name, graph in kept.graphs.items() if name not in decoders for data in graph.data}
    with replacing(output, lambda there: _check_nothing_lost(there, kept)) as new:
        own = {name for decoder in decoders for name in (decoder, *kept.graphs[decoder].data)} - theirs
        carry_over(folder, new, [name for name in kept.files if name not in own])
        graphs, files = dict(kept.graphs), {name: file for name, file in kept.files.items() if name not in own}
        for name, path in decoders.items():
            model = without_conv_inputs(ir.load(path))
            save_alone(model, path.parent, new / name)
            entry = described(model.graph, model.opset_imports[""], model.ir_version)
            graphs[name] = replace(entry, min_onnxruntime=kept.graphs[name].min_onnxruntime, data=(f"{name}_data",))
            files |= {part: File.of(new / part) for part in (name, f"{name}_data")}
        replace(kept, graphs=graphs, files=dict(sorted(files.items()))).write(new)
        complete_for_clients(new)
    return variants


def _check_nothing_lost(there: Path, new: Manifest) -> None:
    """Raise CheckpointError where what is there is not an earlier bundle for browsers of the same weights, or has a
    variant that the new one lacks.
    """
    check_replaceable(there)
    old = Manifest.read(there)
    if old is None:
        return
    decoders = {names[DECODER.stem] for names in old.variants.values()}
    shared = {data for name, entry in old.graphs.items() if name not in decoders for data in entry.data}
    if old.source.weights != new.source.weights or any(shared.intersection(old.graphs[name].data) for name in decoders):
        raise CheckpointError(
            f"{there} is a bundle that export --web did not write of these weights; choose another output"
        )
    if lost := sorted(set(old.variants) - set(new.variants)):
        raise CheckpointError(f"{there} has {lost[0]}, which would be lost; choose another output")


def save_alone(model: ir.Model, places: Path, path: Path) -> None:
    """Write a graph with all its weights in one data file; `places` has the files that they are in so far. One tensor
    is mapped at a time.
    """
    data = DataFile(path.with_name(f"{path.name}_data"), lambda *_: None)
    try:
        for value in model.graph.initializers.values():
            old = value.const_value
            if isinstance(old, ir.ExternalTensor):
                stored = np.memmap(places / old.location, np.uint8, "r", old.offset or 0, (old.nbytes,))
                offset, size = data.write(str(value.name), [stored])
                value.const_value = ir.ExternalTensor(
                    data.path.name, offset, size, old.dtype, shape=old.shape, name=str(value.name)
                )
    finally:
        data.close()
    ir.save(model, path)


def without_conv_inputs(model: ir.Model) -> ir.Model:
    """A decoder without the outputs that only speculation reads, changed in place."""
    graph = model.graph
    for value in [value for value in graph.outputs if str(value.name).startswith(CONV_INPUT)]:
        graph.outputs.remove(value)
    return model
