"""Portable graphs with every shape fixed: in OpenVINO they say what the dynamic ones say in onnxruntime; int8 with
fixed ranges is close.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cache import cached_bundle

pytest.importorskip("torch")
reference = pytest.importorskip("reference")
pytest.importorskip("optimum.exporters.onnx")
if reference.TRANSFORMERS_5:
    pytest.skip("Optimum's exporter needs transformers 4.57", allow_module_level=True)

from lfm_export.export import export  # noqa: E402
from lfm_export.portable.static import StaticShape, write_static  # noqa: E402
from lfm_runtime.commands.cli import main  # noqa: E402
from lfm_runtime.errors import EdgeError  # noqa: E402
from lfm_runtime.formats.contract import present_name  # noqa: E402
from lfm_runtime.images.layout import ImageSettings  # noqa: E402
from lfm_runtime.images.pixels import patchify  # noqa: E402
from PIL import Image  # noqa: E402
from test_graph_parity import cosine, decode  # noqa: E402
from test_portable import OpenVino  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PREFILL, CONTEXT = 24, 40


@pytest.fixture(scope="module")
def portable(tmp_path_factory) -> Path:
    def make(folder: Path) -> None:
        export(reference.DEMO, folder, portable=True)

    return cached_bundle("portable", make, tmp_path_factory.mktemp("portable") / "bundle")


@pytest.fixture(scope="module")
def static(portable, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("static")
    write_static(portable, folder, StaticShape(8, 12, PREFILL, CONTEXT))
    return folder


def test_nothing_is_open(static) -> None:
    for name in ("vision_encoder", "decoder_prefill", "decoder_decode"):
        model = onnx.shape_inference.infer_shapes(onnx.load(static / f"{name}.onnx"), strict_mode=True)
        assert {node.domain for node in model.graph.node} == {""}
        assert not {node.op_type for node in model.graph.node} & {"NonZero", "Range", "Shape", "If", "Loop"}
        for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
            assert all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim), value.name


def test_files_with_another_hard_link_are_read(static, portable, tmp_path) -> None:
    """As `export --web` leaves them."""
    shutil.copytree(portable, tmp_path / "bundle")
    (tmp_path / "web").mkdir()
    for path in (tmp_path / "bundle" / "onnx").iterdir():
        os.link(path, tmp_path / "web" / path.name)
    write_static(tmp_path / "bundle", tmp_path / "static", StaticShape(8, 12, PREFILL, CONTEXT))
    for path in static.glob("*.onnx*"):
        assert (tmp_path / "static" / path.name).read_bytes() == path.read_bytes(), path.name


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


def test_int8_ranges_are_kept_when_shapes_are_fixed(portable, tmp_path) -> None:
    """quantize makes the portable encoder's ranges fixed, calibrated with the demo's images; then the shapes are. An
    image it has not seen.
    """
    from lfm_quantize.quantize import quantize
    from lfm_quantize.settings import Settings

    bundle = Path(shutil.copytree(portable, tmp_path / "bundle"))
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((ROOT / "demo" / "calibration" / "images").iterdir())[::40]:
        shutil.copy(path, images)
    quantize(bundle, Settings("int8-static", (images,), floor=0.1), warn=lambda _: None)
    written = write_static(bundle, tmp_path / "static", StaticShape(16, 16, PREFILL, CONTEXT))
    assert {path.stem for path in written} == {
        "vision_encoder",
        "vision_encoder_int8_static",
        "decoder_prefill",
        "decoder_decode",
    }
    model = onnx.load(tmp_path / "static" / "vision_encoder_int8_static.onnx", load_external_data=False)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    assert {node.domain for node in model.graph.node} == {""}
    image = Image.open(ROOT / "demo/eval/images/0005.png").convert("RGB").resize((256, 256))
    pixels = patchify(np.asarray(image), ImageSettings())[None]
    wanted, got = (
        ort.InferenceSession(tmp_path / "static" / f"{name}.onnx").run(None, {"pixel_values": pixels})[0]
        for name in ("vision_encoder", "vision_encoder_int8_static")
    )
    assert np.median(cosine(got, wanted)) >= 0.99
    sizes = [
        (tmp_path / "static" / f"{n}.onnx_data").stat().st_size
        for n in ("vision_encoder", "vision_encoder_int8_static")
    ]
    assert sizes[1] < 0.4 * sizes[0]


def test_a_portable_bundle_gets_no_other_variant(portable) -> None:
    from lfm_quantize.graph import QuantizeError
    from lfm_quantize.quantize import quantize
    from lfm_quantize.settings import Settings

    with pytest.raises(QuantizeError, match="quantize can make only int8-static"):
        quantize(portable, Settings("int8"), warn=lambda _: None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grid", "8"], "--grid 8 is impossible"),
        (["--grid", "7x8"], "multiples of 2"),
        (["--grid", "0x8"], "impossible"),
        (["--prefill", "8", "--context", "8"], "1 <= prefill < context"),
        (["--grid", "500x500"], "has more than 16384 image tokens"),
        (["--context", "100000"], "the model has 4096 tokens"),
        (["--portable"], "--portable has no effect beside --static"),
        (["--dtype", "fp16"], "--dtype has no effect beside --static"),
        (["--adapter", "x"], "--adapter has no effect beside --static"),
    ],
)
def test_wishes_that_cannot_be_are_refused_in_a_line(portable, tmp_path, capsys, words, said) -> None:
    assert main(["export", str(portable), "-o", str(tmp_path / "s"), "--static", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_sizes_without_static_are_refused(tmp_path, capsys) -> None:
    assert main(["export", str(ROOT / "demo" / "checkpoint"), "-o", str(tmp_path / "b"), "--grid", "8x8"]) == 2
    assert "--grid has no effect without --static" in capsys.readouterr().err


def test_the_command_writes_all_graphs(portable, tmp_path, capsys) -> None:
    out = tmp_path / "static"
    words = ["--static", "--grid", "8x8", "--prefill", "4", "--context", "8"]
    assert main(["export", str(portable), "-o", str(out), *words]) == 0
    said = capsys.readouterr().err
    assert said.count(" MB") == 1 and "vision_encoder.onnx, decoder_prefill.onnx, decoder_decode.onnx" in said
    stems = ("vision_encoder", "decoder_prefill", "decoder_decode")
    names = sorted(["static.json", *(f"{stem}.onnx{end}" for stem in stems for end in ("", "_data"))])
    assert sorted(p.name for p in out.iterdir()) == names
    assert len({p.stat().st_mode for p in out.iterdir()}) == 1, "data as readable as graphs"
    assert main(["export", str(portable), "-o", str(out), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bundle"] == str(out) and found["bytes"] == sum(p.stat().st_size for p in out.iterdir())
    assert main(["export", str(portable), "-o", str(out), *words, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    (out / "vision_encoder_int8_static.onnx").write_text("of another model")
    (out / "mine.txt").write_text("precious")
    assert main(["export", str(portable), "-o", str(out), *words]) == 2
    assert "mine.txt was not written by lfm-edge export --static" in capsys.readouterr().err


def test_a_bundle_that_is_not_portable_is_refused(demo_bundle, tmp_path) -> None:
    with pytest.raises(EdgeError, match="is not portable; make it with"):
        write_static(demo_bundle, tmp_path / "s", StaticShape(8, 8, 4, 8))
    with pytest.raises(EdgeError, match="does not exist"):
        write_static(tmp_path / "nowhere", tmp_path / "s", StaticShape(8, 8, 4, 8))


def test_nothing_is_written_where_it_cannot_be(portable, tmp_path) -> None:
    """An output that is a file or the bundle itself, a graph that is cut off: an error in a line, no file."""
    out = tmp_path / "out"
    out.write_text("a file")
    with pytest.raises(EdgeError, match="cannot be written"):
        write_static(portable, out, StaticShape(8, 8, 4, 8))
    for place, says in ((portable, "holds the graphs that are read"), (portable / "onnx", "lies inside the bundle")):
        with pytest.raises(EdgeError, match=says):
            write_static(portable, place, StaticShape(8, 8, 4, 8))
    others = tmp_path / "others"
    others.mkdir()
    (others / "vision_encoder.onnx").write_text("precious")
    bundle = Path(shutil.copytree(portable, tmp_path / "bundle"))
    for place in (others, bundle):
        with pytest.raises(EdgeError, match=r"export --static did not make; name another one"):
            write_static(portable, place, StaticShape(8, 8, 4, 8))
    assert (others / "vision_encoder.onnx").read_text() == "precious"
    cut = Path(shutil.copytree(portable, tmp_path / "cut"))
    graph = cut / "onnx" / "vision_encoder.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(EdgeError):
        write_static(cut, tmp_path / "s", StaticShape(8, 8, 4, 8))
    assert not (tmp_path / "s").exists()
