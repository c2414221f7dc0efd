"""Portable graphs with every shape fixed, for one sequence and one view: what NPU compilers and other engines without
dynamic shapes take.

    vision_encoder.onnx    pixel_values [1, rows·columns, 768] → image_features [tokens, H]; grid and mask are constants
    decoder_prefill.onnx   inputs_embeds [1, PREFILL, H], attention_mask [1, CONTEXT], past of CONTEXT - PREFILL tokens
    decoder_decode.onnx    the same for one token: past of CONTEXT - 1 tokens
    static.json            what they were made of: model, sizes, files

Besides vision_encoder_int8_static.onnx, where the bundle has that variant. The past is kept at the right end: what is
not there yet, and what a prompt shorter than PREFILL leaves free on its left, is 0 in attention_mask. The past of a
step of one token is the last CONTEXT - 1 tokens of `present`. Embeddings are rows of a table: take them from the
bundle's embed_tokens.onnx_data on the host.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from lfm_profiles import VARIANTS
from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import unreadable
from lfm_runtime.formats.contract import BATCH, DECODER, PAST, PATCHES, TOKENS, TOTAL, VISION_ENCODER
from lfm_runtime.formats.files import check_outside_bundles, read_json_object, to_json
from lfm_runtime.formats.writer import replacing
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnxruntime.tools.onnx_model_utils import fix_output_shapes, make_dim_param_fixed

from lfm_export.checkpoint.config import CheckpointError

NOTE = "static.json"
"""What was written: source, its weights' hash, sizes, files. A folder that has it is replaced by the next run."""
_MOST_TOKENS = 1 << 14
"""Of a view, as for max_image_tokens."""
_INLINE_BYTES = 1024
_BEFORE = {
    BATCH: ("batch", "views"),
    PATCHES: ("patches",),
    TOKENS: ("tokens",),
    PAST: ("past",),
    TOTAL: ("past_and_tokens",),
}
"""What axes are called in bundles exported before 2026-12."""


@dataclass(frozen=True)
class StaticShape:
    """The sizes to fix."""

    rows: int = 32  # of patches; 32 x 32 is one 512 x 512 tile
    columns: int = 32
    prefill: int = 128  # tokens of a prompt's step
    context: int = 512  # tokens in all

    @staticmethod
    def parse(grid: str, prefill: int, context: int) -> StaticShape:
        """From what the user writes; `grid` is rows x columns of patches, such as 32x32.

        Raises:
            CheckpointError: sizes that cannot be.
        """
        sides = re.fullmatch(r"(\d+)x(\d+)", grid)
        if sides is None:
            raise CheckpointError(f"--grid {grid} is impossible; write rows and columns of patches, such as 32x32")
        if not 1 <= prefill < context:
            raise CheckpointError(f"--prefill {prefill} and --context {context} are impossible; 1 <= prefill < context")
        return StaticShape(int(sides[1]), int(sides[2]), prefill, context)


def write_static(folder: Path, output: Path, shape: StaticShape) -> list[Path]:
    """Write the graphs of a portable bundle with fixed shapes; returns them. The folder appears when all are written.

    Args:
        folder: a bundle made by lfm-edge export --portable.
        output: the folder to make; one of an earlier run is replaced.
        shape: the sizes.

    Raises:
        CheckpointError: sizes that the model cannot take, graphs that are not portable, an output with other files.
        BundleError: not a bundle, or the output cannot be written.
        EdgeError: the output lies inside a bundle.
    """
    check_outside_bundles(output)
    bundle = Bundle.open(folder)
    factor = bundle.images.downsample_factor
    if not shape.rows or not shape.columns or shape.rows % factor or shape.columns % factor:
        raise CheckpointError(
            f"--grid {shape.rows}x{shape.columns} is impossible; rows and columns are multiples of {factor}: 32x32"
        )
    if shape.rows * shape.columns // factor**2 > _MOST_TOKENS:
        raise CheckpointError(f"--grid {shape.rows}x{shape.columns} has more than {_MOST_TOKENS} image tokens")
    if shape.context > bundle.context_length:
        raise CheckpointError(f"--context {shape.context} is impossible; the model has {bundle.context_length} tokens")
    exact = bundle.graphs("fp32")[1]
    encoders = [exact[VISION_ENCODER.stem]]
    encoders += [bundle.graphs(v)[1][VISION_ENCODER.stem] for v in bundle.variants if VARIANTS[v].static]
    for path in (*encoders, exact[DECODER.stem]):
        if any(node.domain for node in _load(path).graph.node):
            raise CheckpointError(f"{path} is not portable; make it with: lfm-edge export CHECKPOINT -o B --portable")
    if output.resolve() == bundle.folder.resolve():
        raise CheckpointError(f"{output} holds the graphs that are read; name another folder")
    with replacing(output, _check_ours) as new:
        written = list(_write(encoders, exact[DECODER.stem], shape, factor, new))
        files = sorted(path.name for path in new.iterdir())
        weights = bundle.manifest.source.weights if bundle.manifest else ""
        note = {"model": bundle.folder.name, "weights": weights, **asdict(shape), "files": files}
        (new / NOTE).write_text(to_json(note, indent=2) + "\n", encoding="utf-8")
    return [output / path.name for path in written]


def _check_ours(output: Path) -> None:
    """Raise CheckpointError where something lies in the output that `write_static` did not write."""
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} cannot be written: it is not a folder; name another one")
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if not there:
        return
    if NOTE not in there:
        raise CheckpointError(f"{output} is a folder that lfm-edge export --static did not make; name another one")
    note = read_json_object(output / NOTE, CheckpointError, advice="name another folder, or remove this one")
    named = note.get("files")
    if others := sorted(there - {NOTE, *(named if isinstance(named, list) else ())}):
        what = f"{output / others[0]} was not written by lfm-edge export --static"
        raise CheckpointError(f"{what}, and would be lost; move it")


def _write(encoders: list[Path], decoder: Path, shape: StaticShape, factor: int, new: Path) -> Iterator[Path]:
    patches = shape.rows * shape.columns
    known = {
        "pixel_attention_mask": np.ones((1, patches), np.int64),
        "spatial_shapes": np.array([[shape.rows, shape.columns]], np.int64),
    }
    for path in encoders:
        encoder = _fixed(_load(path), {BATCH: 1, PATCHES: patches}, known)
        yield _save(_all_kept(encoder, patches // factor**2), new / path.name)
    for name, tokens in (("decoder_prefill", shape.prefill), ("decoder_decode", 1)):
        sizes = {BATCH: 1, TOKENS: tokens, PAST: shape.context - tokens, TOTAL: shape.context}
        yield _save(_fixed(_load(decoder), sizes, {}), new / f"{name}.onnx")


def _load(path: Path) -> onnx.ModelProto:
    """Raises CheckpointError where the graph or its data file is damaged."""
    try:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if uses_external_data(tensor):
                _read_data(tensor, path.parent)
    except (DecodeError, OSError, ValueError) as e:
        if isinstance(e, OSError):
            raise unreadable(path, e, CheckpointError, "copy the bundle again") from e
        reason = " ".join(str(e).split())[:200]
        raise CheckpointError(f"{path} cannot be read ({reason}); export the bundle again") from e
    return model


def _read_data(tensor: onnx.TensorProto, folder: Path) -> None:
    """Put a tensor's data into it. onnx itself refuses files with several hard links, as `export --web` leaves them; so
    the name is held against the folder here.
    """
    found = ExternalDataInfo(tensor)
    if Path(found.location).name != found.location:
        raise ValueError(f"{tensor.name} names the data file {found.location!r}, which is not beside the graph")
    size = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    with (folder / found.location).open("rb") as f:
        f.seek(found.offset or 0)
        tensor.raw_data = f.read(size)
    if len(tensor.raw_data) != size or (found.length or size) != size:
        raise ValueError(f"{found.location} is shorter than {tensor.name} says")
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def _fixed(model: onnx.ModelProto, sizes: Mapping[str, int], known: Mapping[str, NDArray[np.int64]]) -> onnx.ModelProto:
    """Axes by name and inputs by value; what follows from them is folded by onnxruntime, with standard operators
    alone: fusions above its basic level are not ONNX's own.
    """
    for name, value in known.items():
        model.graph.input.remove(next(i for i in model.graph.input if i.name == name))
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for name, size in sizes.items():
        for called in (name, *_BEFORE.get(name, ())):
            make_dim_param_fixed(model.graph, called, size)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.onnx", Path(folder) / "folded.onnx"
        onnx.save(model, source, save_as_external_data=True, location="source.onnx_data", size_threshold=_INLINE_BYTES)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "folded.onnx_data")
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        folded = onnx.load(target)
    fix_output_shapes(folded)
    return folded


def _all_kept(model: onnx.ModelProto, tokens: int) -> onnx.ModelProto:
    """Where nothing is padding, dropping padding is a reshape; onnxruntime folds all but NonZero, whose result's size
    follows from values.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    selects = next(node for node in graph.node if node.op_type == "NonZero")
    assert numpy_helper.to_array(constants[selects.input[0]]).all()
    ordered = next(node for node in graph.node if selects.output[0] in node.input)
    gather = next(node for node in graph.node if ordered.output[0] in node.input)
    assert (ordered.op_type, gather.op_type) == ("Transpose", "GatherND")
    rows = np.array([-1, _row_width(graph, constants, gather.output[0])], np.int64)
    graph.initializer.append(numpy_helper.from_array(rows, "image_tokens_shape"))
    reshape = onnx.helper.make_node(
        "Reshape", [gather.input[0], "image_tokens_shape"], [gather.output[0]], name="image_tokens"
    )
    graph.node.insert(list(graph.node).index(gather), reshape)
    for node in (selects, ordered, gather):
        graph.node.remove(node)
    graph.initializer.remove(constants[selects.input[0]])
    make_dim_param_fixed(graph, "image_tokens", tokens)
    return model


def _row_width(graph: onnx.GraphProto, constants: Mapping[str, onnx.TensorProto], name: str) -> int:
    """Width of the rows that the projector reads: its LayerNormalization's, or first product's, weights say it. In a
    graph with fixed ranges, behind quantizing and dequantizing.
    """
    makers = {output: node for node in graph.node for output in node.output}
    reader = next(node for node in graph.node if name in node.input)
    while reader.op_type in ("QuantizeLinear", "DequantizeLinear"):
        name = reader.output[0]
        reader = next(node for node in graph.node if name in node.input)
    others = [i for i in reader.input if i != name]
    stored = [makers[i].input[0] if i in makers else i for i in others]
    return int(next(constants[i].dims[0] for i in stored if i in constants))


def _save(model: onnx.ModelProto, path: Path) -> Path:
    """The graph, its weights beside it, checked."""
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=_INLINE_BYTES)
    onnx.checker.check_model(str(path), full_check=True)
    path.with_name(f"{path.name}_data").chmod(path.stat().st_mode)  # onnx makes it private
    return path
