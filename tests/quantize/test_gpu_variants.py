"""Variants for GPUs over other variants' files: what they keep, what they cost, when they go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import read_manifest
from lfm_export.export import export
from lfm_quantize.graph import QuantizeError, open_graph, session
from lfm_quantize.passes.biases import FusedBiases
from lfm_quantize.passes.half import Half
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.quantize import quantize
from lfm_quantize.settings import Settings
from lfm_runtime import Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, NEXT_MASK, TOP_IDS, TOP_LOGITS, VISION_ENCODER
from lfm_runtime.formats.manifest import file_hash

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(demo_bundle, few, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(demo_bundle, tmp_path_factory.mktemp("gpu") / "bundle"))
    for variant in ("fp16", "int4"):
        quantize(folder, Settings(variant), warn=lambda _: None)
    for variant in ("int4-fp16", "fp16-trt"):
        quantize(folder, Settings(variant, (few / "images",), few / "calibration.jsonl"), warn=lambda _: None)
    return folder


def test_over_the_others_files(bundle) -> None:
    """Graphs of some kilobytes; the manifest names the files they need, and how near fp32 they are."""
    manifest = read_manifest(bundle)
    graphs = {variant: Bundle.open(bundle).graphs(variant)[1] for variant in ("int4", "fp16", "int4-fp16", "fp16-trt")}
    assert graphs["int4-fp16"][VISION_ENCODER.stem] == graphs["fp16"][VISION_ENCODER.stem]
    assert graphs["int4-fp16"][EMBED_TOKENS.stem] == graphs["int4"][EMBED_TOKENS.stem]
    assert graphs["fp16-trt"][DECODER.stem] == graphs["fp16"][DECODER.stem]
    for variant, stem, data in (
        ("int4-fp16", DECODER.stem, ["onnx/decoder_model_merged_q4.onnx_data", "onnx/embed_tokens_q4.onnx_data"]),
        ("fp16-trt", VISION_ENCODER.stem, ["onnx/vision_encoder_fp16.onnx_data"]),
    ):
        path = graphs[variant][stem]
        assert path.stat().st_size < 100_000
        assert manifest["graphs"][path.relative_to(bundle).as_posix()]["data"] == data
    assert manifest["quality"]["int4-fp16"]["kl"] < 0.01  # rounded without images
    assert manifest["quality"]["fp16-trt"]["kl"] < 1e-5
    assert manifest["quality"]["fp16-trt"]["cosine_min"] > 0.9999


def test_int4_with_fp16_activations(bundle) -> None:
    """Nothing of the decoder is fp32 but its edges and positions; what it says is near int4's own."""
    path = Bundle.open(bundle).graphs("int4-fp16")[1][DECODER.stem]
    model = onnx.load(str(path), load_external_data=False)
    assert {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT} == {
        "rotary.inverse_frequencies.fp32"
    }
    casts = [n.name for n in model.graph.node if n.op_type == "Cast" and n.name.endswith(".scales")]
    assert not casts  # scales are read as they are stored
    a, b = (Model.load(bundle, variant=v, threads=1) for v in ("int4", "int4-fp16"))
    ids = [5, 300, 20, 41, 77]
    x, y = (np.array(m.decoder.start(8).step(m.decoder.embed(ids))) for m in (a, b))
    assert float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) > 0.999


@pytest.mark.parametrize("keep", ["text.layers.*.conv", "text.layers.*.self_attn.q_layernorm", "Mul*"])
def test_operators_with_functions_kept_in_fp32(demo_bundle, tmp_path, keep) -> None:
    """Casts stand around them, and around the states."""
    folder = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    quantize(folder, Settings("fp16", keep=(keep,)), warn=lambda _: None)
    plain, half = (Model.load(folder, variant=v, threads=1) for v in ("fp32", "fp16"))
    ids = [5, 300, 20, 41, 77]
    x, y = (np.array(m.decoder.start(8).step(m.decoder.embed(ids))) for m in (plain, half))
    assert float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) > 0.999


def test_biases_are_added_where_values_are_read(demo_bundle) -> None:
    """The same features; what is not fp16, or read by more than the norm, is left alone."""
    fp32 = open_graph(Bundle.open(demo_bundle).graphs("fp32")[1][VISION_ENCODER.stem])
    plain = rewritten(fp32, Half())
    made = rewritten(plain, FusedBiases())
    kinds = Counter(node.op_type for node in made.graph)
    assert (kinds["SkipLayerNormalization"], kinds["FastGelu"]) == (9, 4)  # of four layers, and the last norm
    rng = np.random.default_rng(0)
    feeds = {
        "pixel_values": rng.uniform(-1, 1, (2, 24, 768)).astype(np.float32),
        "pixel_attention_mask": np.ones((2, 24), np.int64),
        "spatial_shapes": np.array([[4, 6], [6, 4]]),
    }
    a, b = (session(model, 1).run(["image_features"], feeds)[0] for model in (plain, made))
    np.testing.assert_allclose(a, b, atol=0.01 * np.abs(a).max())
    assert not FusedBiases()(made).modified
    assert not FusedBiases()(fp32).modified


def test_a_new_base_takes_them_away(bundle, tmp_path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    said: list[str] = []
    quantize(copy, Settings("fp16"), warn=said.append)
    assert sorted(line.split()[0] for line in said if "quantize it again" in line) == ["fp16-trt", "int4-fp16"]
    assert {"int4-fp16", "fp16-trt"}.isdisjoint(Bundle.open(copy).variants)
    assert not [*copy.glob("onnx/*q4f16*"), *copy.glob("onnx/*trt*")]


def test_from_an_fp16_export(tmp_path) -> None:
    """Exported in fp16, decoders have the outputs for GPUs as well; int4 made of it is a CPU's, without."""
    folder = tmp_path / "bundle"
    export(ROOT / "demo" / "checkpoint", folder, dtype="fp16")
    for variant in ("int4", "int4-fp16", "fp16-trt"):
        quantize(folder, Settings(variant), warn=lambda _: None)
    for variant, wanted in (("fp16", True), ("int4", False), ("int4-fp16", True)):
        path = Bundle.open(folder).graphs(variant)[1][DECODER.stem]
        names = {o.name for o in onnx.load(str(path), load_external_data=False).graph.output}
        assert ({TOP_LOGITS, TOP_IDS, NEXT_MASK} <= names) is wanted, variant
        assert ({TOP_LOGITS, TOP_IDS, NEXT_MASK}.isdisjoint(names)) is not wanted, variant


def test_gpu_variants_without_their_base_are_refused(demo_bundle, few, capsys) -> None:
    for words, said in [
        (["--variant", "int4-fp16"], "has no variant 'int4'"),
        (["--variant", "fp16-trt"], "has no variant 'fp16'"),
        (["--variant", "fp16-trt", "--method", "rtn"], "no effect"),
        (["--variant", "int4-fp16", "--keep", "head"], "no effect"),
        (["--variant", "int4-fp16", "--floor", "0.1"], "--floor needs --calibration"),
    ]:
        assert main(["quantize", str(demo_bundle), "--quiet", *words]) == 2
        assert said in capsys.readouterr().err


def test_what_stays_fp32_in_fp16_stays_in_the_others(demo_bundle, few, tmp_path) -> None:
    """Nodes that fp16 does not hold: int4-fp16 keeps them as well, and TensorRT's graph of one type is refused."""
    folder = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    quantize(
        folder, Settings("fp16", keep=("text.layers.3.*", "vision.encoder.layers.0.self_attn.qkv")), warn=lambda _: None
    )
    quantize(folder, Settings("int4"), warn=lambda _: None)
    quantize(folder, Settings("int4-fp16"), warn=lambda _: None)
    model = onnx.load(str(Bundle.open(folder).graphs("int4-fp16")[1][DECODER.stem]), load_external_data=False)
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    fp32 = [name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT]
    assert any(name.startswith("text.layers.3.ffn_norm") for name in fp32), fp32
    product = next(n for n in model.graph.node if n.name == "text.layers.3.feed_forward.w2.matmul")
    assert product.input[0].endswith(".fp32") or product.input[0] not in kinds
    assert (
        Model.load(folder, variant="int4-fp16", threads=1).answer([], "x", temperature=0, max_new_tokens=3).text()
        is not None
    )
    with pytest.raises(QuantizeError, match="stays fp32, because its values overflow fp16 or --keep names it"):
        quantize(folder, Settings("fp16-trt"), warn=lambda _: None)


@pytest.mark.process
def test_the_same_inputs_give_the_same_graphs(demo_bundle, tmp_path) -> None:
    """Whatever order this Python's sets have."""
    code = "import sys; from lfm_runtime.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    found = []
    for seed in ("1", "4"):
        bundle = Path(shutil.copytree(demo_bundle, tmp_path / seed))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
        words = [sys.executable, "-c", code, "quantize", str(bundle), "--variant", "fp16"]
        subprocess.run(words, check=True, capture_output=True, env=environment)
        found.append({path.name: file_hash(path) for path in sorted((bundle / "onnx").iterdir())})
    assert found[0] == found[1]
