"""Portable graphs with every shape fixed: in OpenVINO they say what the dynamic ones say in onnxruntime; int8 with
fixed ranges is close.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

pytest.importorskip("torch")
reference = pytest.importorskip("reference")
pytest.importorskip("optimum.exporters.onnx")
if reference.TRANSFORMERS_5:
    pytest.skip("Optimum's exporter needs transformers 4.57", allow_module_level=True)

import shape_static  # noqa: E402
from lfm_export.export import export  # noqa: E402
from lfm_runtime.errors import EdgeError  # noqa: E402
from lfm_runtime.formats.contract import present_name  # noqa: E402
from PIL import Image  # noqa: E402
from test_graph_parity import cosine, decode  # noqa: E402
from test_portable import OpenVino  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PREFILL, CONTEXT = 24, 40


@pytest.fixture(scope="module")
def portable(tmp_path_factory) -> Path:
    bundle = tmp_path_factory.mktemp("portable") / "bundle"
    export(reference.DEMO, bundle, portable=True)
    return bundle


@pytest.fixture(scope="module")
def static(portable, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("static")
    list(shape_static.write_static(portable, folder, "8x12", PREFILL, CONTEXT))
    return folder


def test_nothing_is_open(static) -> None:
    for name in ("vision_encoder", "decoder_prefill", "decoder_decode"):
        model = onnx.shape_inference.infer_shapes(onnx.load(static / f"{name}.onnx"), strict_mode=True)
        assert {node.domain for node in model.graph.node} == {""}
        assert not {node.op_type for node in model.graph.node} & {"NonZero", "Range", "Shape", "If", "Loop"}
        for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
            assert all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim), value.name


def test_vision(static, portable) -> None:
    pixels, grids, mask = reference.random_views([(8, 12)])
    (wanted,) = ort.InferenceSession(portable / "onnx" / "vision_encoder.onnx").run(
        None, {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids}
    )
    (got,) = ort.InferenceSession(static / "vision_encoder.onnx").run(None, {"pixel_values": pixels})
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    np.testing.assert_allclose(
        OpenVino(static / "vision_encoder.onnx").run({"pixel_values": pixels})["image_features"], wanted, atol=1e-3
    )


def test_a_prompt_and_what_follows(static, portable) -> None:
    """A prompt of 17 tokens in a step of 24, then ten tokens one by one, in OpenVINO: the logits of onnxruntime with
    open shapes.
    """
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((1, 27, 256)).astype(np.float32) * 0.3
    session = ort.InferenceSession(portable / "onnx" / "decoder_model_merged.onnx")
    graphs = {name: OpenVino(static / f"decoder_{name}.onnx") for name in ("prefill", "decode")}
    mask = np.zeros((1, CONTEXT), np.int64)

    def step(
        graph: OpenVino, part: np.ndarray, new: int, past: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        mask[:] = np.concatenate([mask[:, new:], np.ones((1, new), np.int64)], 1)
        found = graph.run({"inputs_embeds": part, "attention_mask": mask, **past})
        kept = {name: found[present_name(name)] for name in past}
        return found["logits"][0, -1], {
            n: v.copy() if n.startswith("past_conv") else v[:, :, 1:].copy() for n, v in kept.items()
        }

    past = {
        name: np.zeros([int(n.get_length()) for n in shape], np.float32)
        for name, shape in graphs["prefill"].inputs
        if name.startswith("past_")
    }
    prompt = np.zeros((1, PREFILL, 256), np.float32)
    prompt[:, -17:] = embeds[:, :17]
    logits, past = step(graphs["prefill"], prompt, 17, past)
    np.testing.assert_allclose(logits, decode(session, embeds[:, :17], [17]), atol=1e-3)
    for n in range(17, 27):
        logits, past = step(graphs["decode"], embeds[:, n : n + 1], 1, past)
    np.testing.assert_allclose(logits, decode(session, embeds, [17] + [1] * 10), atol=1e-3)


def test_int8(portable, tmp_path) -> None:
    """Calibrated with the demo's images; an image it has not seen."""
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((ROOT / "demo" / "calibration" / "images").iterdir())[:8]:
        (images / path.name).write_bytes(path.read_bytes())
    list(shape_static.write_static(portable, tmp_path / "int8", "16x16", PREFILL, CONTEXT, images))
    list(shape_static.write_static(portable, tmp_path / "fp32", "16x16", PREFILL, CONTEXT))
    model = onnx.load(tmp_path / "int8" / "vision_encoder.onnx", load_external_data=False)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    assert {node.domain for node in model.graph.node} == {""}
    pixels = shape_static.patches(Image.open(ROOT / "demo/eval/images/0005.png"), 16, 16)
    wanted, got = (
        ort.InferenceSession(tmp_path / n / "vision_encoder.onnx").run(None, {"pixel_values": pixels})[0]
        for n in ("fp32", "int8")
    )
    assert np.median(cosine(got, wanted)) >= 0.99
    sizes = [(tmp_path / n / "vision_encoder.onnx_data").stat().st_size for n in ("fp32", "int8")]
    assert sizes[1] < 0.4 * sizes[0]


def test_patches_as_the_runtime_cuts_them() -> None:
    from lfm_runtime.images.layout import ImageSettings
    from lfm_runtime.images.pixels import patchify

    image = Image.open(ROOT / "demo/eval/images/0001.png").convert("RGB").resize((12 * 16, 8 * 16))
    wanted = patchify(np.asarray(image), ImageSettings())
    np.testing.assert_allclose(shape_static.patches(image, 8, 12)[0], np.asarray(wanted).reshape(96, 768), atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "prefill", "context", "said"),
    [
        ("8", 4, 8, "--grid 8 is impossible"),
        ("7x8", 4, 8, "multiples of 2"),
        ("0x8", 4, 8, "impossible"),
        ("8x8", 8, 8, "1 <= prefill < context"),
    ],
)
def test_sizes_that_cannot_be(portable, tmp_path, grid, prefill, context, said) -> None:
    with pytest.raises(EdgeError, match=said):
        list(shape_static.write_static(portable, tmp_path, grid, prefill, context))


def test_bundles_that_are_not_portable(demo_bundle, portable, tmp_path) -> None:
    with pytest.raises(EdgeError, match="is not portable; make it with"):
        list(shape_static.write_static(demo_bundle, tmp_path / "s", "8x8", 4, 8))
    with pytest.raises(EdgeError, match="has no PNG or JPEG"):
        list(shape_static.write_static(portable, tmp_path / "s", "8x8", 4, 8, tmp_path))


def test_nothing_is_written_of_what_cannot_be(portable, tmp_path) -> None:
    """An image that is none, an output that is a file or the bundle itself, a graph that is cut off: an error in a
    line, no file.
    """
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"\x89PNG no")
    out = tmp_path / "out"
    with pytest.raises(EdgeError, match=r"a\.png"):
        list(shape_static.write_static(portable, out, "8x8", 4, 8, images))
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(EdgeError, match="cannot be made"):
        list(shape_static.write_static(portable, out, "8x8", 4, 8))
    with pytest.raises(EdgeError, match="holds the graphs that are read"):
        list(shape_static.write_static(portable, portable / "onnx", "8x8", 4, 8))
    cut = tmp_path / "cut"
    (cut / "onnx").mkdir(parents=True)
    (cut / "config.json").write_bytes((portable / "config.json").read_bytes())
    for path in (portable / "onnx").glob("*.onnx"):
        (cut / "onnx" / path.name).write_bytes(path.read_bytes()[:1000])
    with pytest.raises(EdgeError, match="cannot be read"):
        list(shape_static.write_static(cut, tmp_path / "s", "8x8", 4, 8))
    assert not (tmp_path / "s").exists()
