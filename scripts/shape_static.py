"""Portable graphs with every shape fixed, for engines that need that (NPU compilers, TensorRT without profiles, …).

    lfm-edge export CHECKPOINT -o portable --portable
    python scripts/shape_static.py portable -o static --grid 32x32 --prefill 128 --context 512 [--int8 IMAGES]

writes, for one sequence and one view:

    vision_encoder.onnx    pixel_values [1, rows·columns, 768] → image_features [tokens, H]; grid and mask are constants
    decoder_prefill.onnx   inputs_embeds [1, PREFILL, H], attention_mask [1, CONTEXT], past of CONTEXT - PREFILL tokens
    decoder_decode.onnx    the same for one token: past of CONTEXT - 1 tokens

The past is kept at the right end: what is not there yet, and what a prompt shorter than PREFILL leaves free on its
left, is 0 in attention_mask. The past of a step of one token is the last CONTEXT - 1 tokens of `present`. Embeddings
are rows of a table: take them from embed_tokens.onnx_data on the host.

--int8 fixes activation ranges of the vision encoder as well (QDQ, onnxruntime's quantizer), calibrated with a folder of
images.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from lfm_runtime.errors import BundleError, EdgeError
from lfm_runtime.formats.files import read_json_object
from lfm_runtime.images.pixels import open_image
from onnx import numpy_helper
from onnxruntime.tools.onnx_model_utils import fix_output_shapes, make_dim_param_fixed
from PIL import Image

PATCH, CHANNELS = 16, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--grid", default="32x32", help="rows x columns of patches (default 32x32: one 512×512 tile)")
    parser.add_argument("--prefill", type=int, default=128, help="tokens of a prompt's step (default 128)")
    parser.add_argument("--context", type=int, default=512, help="tokens in all (default 512)")
    parser.add_argument(
        "--int8", type=Path, metavar="IMAGES", help="folder of images to calibrate an int8 vision encoder with"
    )
    options = parser.parse_args()
    try:
        for path in write_static(
            options.bundle, options.output, options.grid, options.prefill, options.context, options.int8
        ):
            print(f"{path}  {sum(p.stat().st_size for p in path.parent.glob(f'{path.name}*')) / 1e6:.1f} MB")
    except EdgeError as e:
        parser.exit(2, f"shape_static: {e}\n")


def write_static(
    bundle: Path, output: Path, grid: str, prefill: int, context: int, images: Path | None = None
) -> Iterator[Path]:
    """Each file, when it is written. Raises EdgeError for sizes that cannot be, or a bundle without portable graphs."""
    sides = re.fullmatch(r"(\d+)x(\d+)", grid)
    rows, columns = (int(sides[1]), int(sides[2])) if sides else (0, 0)
    factor = int(read_json_object(bundle / "config.json", BundleError).get("downsample_factor", 2))
    if factor < 1 or not rows or not columns or rows % factor or columns % factor:
        raise EdgeError(f"--grid {grid} is impossible; write rows and columns of patches, multiples of {factor}: 32x32")
    if not 1 <= prefill < context:
        raise EdgeError(f"--prefill {prefill} and --context {context} are impossible; 1 <= prefill < context")
    vision, decoder = (bundle / "onnx" / f"{stem}.onnx" for stem in ("vision_encoder", "decoder_model_merged"))
    for path in (vision, decoder):
        if not path.exists():
            raise EdgeError(f"{path} does not exist; make it with: lfm-edge export CHECKPOINT -o {bundle} --portable")
        if any(node.domain for node in load(path).graph.node):
            raise EdgeError(f"{path} is not portable; make it with: lfm-edge export CHECKPOINT -o {bundle} --portable")
    samples = read_samples(images, rows, columns) if images else []
    if output.resolve() == vision.parent.resolve():
        raise EdgeError(f"{output} holds the graphs that are read; name another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise EdgeError(f"{output} cannot be made ({e.strerror}); name another folder") from e

    known = {
        "pixel_attention_mask": np.ones((1, rows * columns), np.int64),
        "spatial_shapes": np.array([[rows, columns]], np.int64),
    }
    encoder = all_kept(fixed(load(vision), {"views": 1, "patches": rows * columns}, known), rows * columns // factor**2)
    yield write(quantized(encoder, samples) if images else encoder, output / "vision_encoder.onnx")
    for name, tokens in (("decoder_prefill", prefill), ("decoder_decode", 1)):
        sizes = {"batch": 1, "tokens": tokens, "past": context - tokens, "past_and_tokens": context}
        yield write(fixed(load(decoder), sizes, {}), output / f"{name}.onnx")


def load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as e:
        raise EdgeError(f"{path} cannot be read ({' '.join(str(e).split())[:200]}); export the bundle again") from e


def fixed(model: onnx.ModelProto, sizes: dict[str, int], known: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Axes by name and inputs by value; what follows from them is folded by onnxruntime, with standard operators alone."""
    for name, value in known.items():
        model.graph.input.remove(next(i for i in model.graph.input if i.name == name))
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for name, size in sizes.items():
        make_dim_param_fixed(model.graph, name, size)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.onnx", Path(folder) / "folded.onnx"
        onnx.save(model, source, save_as_external_data=True, location="source.onnx_data", size_threshold=1024)
        options = ort.SessionOptions()
        options.graph_optimization_level = (
            ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        )  # fusions of later levels are not ONNX's own
        options.optimized_model_filepath = str(target)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "folded.onnx_data")
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        folded = onnx.load(target)
    fix_output_shapes(folded)
    return folded


def all_kept(model: onnx.ModelProto, tokens: int) -> onnx.ModelProto:
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
    shape = numpy_helper.from_array(
        np.array([-1, graph_width(model, gather.output[0])], np.int64), "image_tokens_shape"
    )
    graph.initializer.append(shape)
    place = list(graph.node).index(gather)
    graph.node.insert(
        place, onnx.helper.make_node("Reshape", [gather.input[0], shape.name], [gather.output[0]], name="image_tokens")
    )
    for node in (selects, ordered, gather):
        graph.node.remove(node)
    graph.initializer.remove(constants[selects.input[0]])
    make_dim_param_fixed(graph, "image_tokens", tokens)
    return model


def graph_width(model: onnx.ModelProto, name: str) -> int:
    """Of the rows that the projector reads: its LayerNormalization's, or first product's, weights say it."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    reader = next(node for node in model.graph.node if name in node.input)
    return int(next(constants[i].dims[0] for i in reader.input if i in constants))


def write(model: onnx.ModelProto, place: Path) -> Path:
    """The graph and its weights beside it, checked, and only then under their names."""
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        work, data = Path(folder) / place.name, f"{place.name}_data"
        onnx.save(model, work, save_as_external_data=True, location=data, size_threshold=1024)
        onnx.checker.check_model(str(work), full_check=True)
        work.with_name(data).replace(place.with_name(data))
        work.replace(place)
    return place


def read_samples(images: Path, rows: int, columns: int) -> list[np.ndarray]:
    """Return the pixel_values of each PNG or JPEG in a folder; raises EdgeError where there is none."""
    paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise EdgeError(f"{images} has no PNG or JPEG images; name a folder of a few dozen")
    return [patches(open_image(path), rows, columns) for path in paths]


def quantized(model: onnx.ModelProto, samples: list[np.ndarray]) -> onnx.ModelProto:
    """Weights int8 by output channel, activations int8 with one range a tensor."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            sample = next(self.rest, None)
            return None if sample is None else {"pixel_values": sample}

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source, save_as_external_data=True, location="fp32.onnx_data", size_threshold=1024)
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "MatMulConstBOnly": True},
        )
        return onnx.load(target)


def patches(image: Image.Image, rows: int, columns: int) -> np.ndarray:
    """[1, rows·columns, 768] in [-1, 1], as the model reads them: each patch's pixels row by row, channels last."""
    pixels = np.asarray(image.convert("RGB").resize((columns * PATCH, rows * PATCH)), np.float32) / 127.5 - 1
    cut = pixels.reshape(rows, PATCH, columns, PATCH, CHANNELS).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(cut.reshape(1, rows * columns, PATCH * PATCH * CHANNELS))


if __name__ == "__main__":
    main()
