"""Graphs taken apart: parts add up to the whole, equivalent changes change nothing, fp16 graphs are what fp32 ones say."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from lfm_export.export import export
from lfm_quantize.calibrate.blocks import all_positions, blocks_of, decoder_feeds, run_block
from lfm_quantize.calibrate.samples import View
from lfm_quantize.graph import Graph, Linear, QuantizeError
from lfm_quantize.passes.gpu import for_gpu
from lfm_quantize.passes.half import half, overflowing
from lfm_quantize.passes.smooth import folded, sources
from lfm_quantize.quality import cosines
from lfm_quantize.quantize import Settings, quantize
from lfm_runtime import Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.formats.contract import DECODER

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def graphs(demo_bundle) -> dict[str, Graph]:
    return {stem: Graph.open(path) for stem, path in Bundle.open(demo_bundle).variants["fp32"].items()}


@pytest.fixture(scope="module")
def view() -> View:
    return View(np.random.default_rng(0).uniform(-1, 1, (8 * 12, 768)).astype(np.float32), 8, 12)


@pytest.fixture(scope="module")
def embeds() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, 30, 256)).astype(np.float32)


def whole(graph: Graph, feeds, output: str) -> np.ndarray:
    return graph.session(1).run([output], {n: v for n, v in feeds.items() if n in graph.inputs})[0]


def test_blocks_in_a_row_are_the_graph(demo_bundle, graphs, view, embeds) -> None:
    """Against onnxruntime on the untouched files; the decoder's last position, which is all that the file gives out."""
    files = Bundle.open(demo_bundle).variants["fp32"]
    vision, decoder = graphs["vision_encoder"], all_positions(graphs["decoder_model_merged"])
    for graph, feeds, stem, output in (
        (vision, view.feeds(), "vision_encoder", "image_features"),
        (decoder, decoder_feeds(decoder, embeds), "decoder_model_merged", "logits"),
    ):
        blocks = blocks_of(graph)
        assert {name for block in blocks for name in block.linears} == set(graph.linears())
        states = [{}]
        for block in blocks:
            states = run_block(graph, block, [feeds], states, 1)
        (wanted,) = ort.InferenceSession(str(files[stem])).run([output], feeds)
        got = states[0][output]
        if stem.startswith("decoder"):
            assert got.shape[:2] == (1, 30)
            got = got[:, -1:]
        np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.fixture(scope="module")
def unlike(tmp_path_factory) -> Path:
    """A random bundle unlike the demo: biased convolutions, a head of its own, widths that blocks do not divide."""
    reference = pytest.importorskip("reference")
    folder = tmp_path_factory.mktemp("unlike")
    model = reference.tiny_model(text={"conv_bias": True, "tie_word_embeddings": False}, tie_word_embeddings=False)
    reference.save_tiny(model, folder / "checkpoint")
    export(folder / "checkpoint", folder / "bundle")
    return folder / "bundle"


@pytest.mark.parametrize("variant", ["int8", "int4", "fp16"])
@pytest.mark.parametrize("images", [None, ROOT / "demo" / "photos"], ids=["blind", "calibrated"])
def test_another_architecture(unlike, tmp_path, variant, images) -> None:
    """It loads, answers, and is near fp32, with and without images."""
    bundle = Path(shutil.copytree(unlike, tmp_path / "bundle"))
    quantize(
        bundle,
        Settings(
            variant,
            images,
            floor=5.0 if images else None,
            method=None if variant == "fp16" or images is None else "gptq",
        ),
    )
    exact, model = (
        Model.load(bundle, variant=v, threads=1, max_image_tokens=64, do_image_splitting=False)
        for v in ("fp32", variant)
    )
    a, b = (m.encode([m.open(ROOT / "demo/photos/coffee.jpg")]) for m in (exact, model))
    assert cosines(a, b).min() > 0.99
    ids = [5, 300, 20, 41]
    a, b = (np.array(m.decoder.start(8).step(m.decoder.embed(ids))) for m in (exact, model))
    assert cosines(a[None], b[None]).min() > (
        0.9 if variant == "int4" else 0.999
    )  # random weights, 64 wide: 4 bits tell


@pytest.mark.parametrize("stem", ["vision_encoder", "decoder_model_merged"])
@pytest.mark.parametrize("which", ["demo", "unlike"])
def test_factors_change_nothing(graphs, unlike, view, which, stem) -> None:
    """Random factors on every product that has a source, folded into it: the same outputs in fp32."""
    graph = graphs[stem] if which == "demo" else Graph.open(Bundle.open(unlike).variants["fp32"][stem])
    width = 256 if which == "demo" else 64
    embeds = np.random.default_rng(1).standard_normal((1, 30, width)).astype(np.float32)
    feeds = view.feeds() if stem == "vision_encoder" else decoder_feeds(graph, embeds)
    where, linears = sources(graph), graph.linears()
    if which == "demo":
        assert len(where) == len(linears) - len(
            [n for n in linears if n.endswith(("fc2", "patch_embedding", "linear_2", "head"))]
        )
    rng = np.random.default_rng(2)
    factors = {
        name: source.tie(np.exp(rng.normal(0, 1, linears[name].k)).astype(np.float32)) for name, source in where.items()
    }
    weights = {name: graph.weight(linear).copy() for name, linear in linears.items()}
    biases = {name: linear.bias for name, linear in linears.items()}
    names = {v for s in where.values() for v in s.vectors} | {b for b in biases.values() if b}
    vectors = {name: graph.tensors[name].array for name in names}
    folded(weights, vectors, factors, where, biases)
    from lfm_quantize.graph import Tensor

    changed = {
        linears[n].weight: Tensor.of(w if linears[n].by_output else np.ascontiguousarray(w.T))
        for n, w in weights.items()
    }
    changed |= {name: Tensor.of(v) for name, v in vectors.items()}
    output = graph.outputs[0].name
    wanted = whole(graph, feeds, output)
    np.testing.assert_allclose(
        whole(graph.replaced({}, changed), feeds, output), wanted, atol=2e-4 * np.abs(wanted).max()
    )
    weights[next(iter(where))] *= 1.1  # and the test can fail
    changed = {
        linears[n].weight: Tensor.of(w if linears[n].by_output else np.ascontiguousarray(w.T))
        for n, w in weights.items()
    }
    assert np.abs(whole(graph.replaced({}, changed), feeds, output) - wanted).max() > 1e-3 * np.abs(wanted).max()


def test_written_and_read_again(graphs, embeds, tmp_path) -> None:
    graph = graphs["decoder_model_merged"]
    graph.save(tmp_path / "again.onnx")
    feeds = decoder_feeds(graph, embeds)
    (got,) = ort.InferenceSession(str(tmp_path / "again.onnx")).run(["logits"], feeds)
    np.testing.assert_allclose(got, whole(graph, feeds, "logits"), atol=1e-4)


def test_half_is_the_exporters_half(graphs, view, embeds, tmp_path) -> None:
    """Same types at the edges as the fp16 graphs of lfm-edge export, and the same numbers to fp16's precision."""
    export(ROOT / "demo" / "checkpoint", tmp_path / "bundle", dtype="fp16")
    for stem, path in Bundle.open(tmp_path / "bundle").variants["fp16"].items():
        made = half(graphs[stem])
        (for_gpu(made) if stem == DECODER.stem else made).save(tmp_path / f"{stem}.onnx")
        ours, theirs = (ort.InferenceSession(str(p)) for p in (tmp_path / f"{stem}.onnx", path))
        for edges in ("get_inputs", "get_outputs"):
            wanted = {
                (e.name, e.type) for e in getattr(theirs, edges)() if not e.name.startswith("conv_window.")
            }  # not for GPUs
            assert {(e.name, e.type) for e in getattr(ours, edges)()} == wanted
        feeds = view.feeds() if stem == "vision_encoder" else {"input_ids": np.arange(40)[None]}
        if stem.startswith("decoder"):
            feeds = decoder_feeds(Graph.open(path, widen=False), embeds)
        a, b = ours.run(None, feeds)[0], theirs.run(None, feeds)[0]
        assert cosines(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])).min() > 0.99999
    # An fp16 file read as fp32 is the fp32 graph again, but for the weights' rounding: this checkpoint has none.
    widened = Graph.open(Bundle.open(tmp_path / "bundle").variants["fp16"]["vision_encoder"])
    np.testing.assert_allclose(
        whole(widened, view.feeds(), "image_features"),
        whole(graphs["vision_encoder"], view.feeds(), "image_features"),
        atol=1e-3,
    )


def test_what_overflows_stays_fp32(graphs, view, tmp_path) -> None:
    """A projection whose outputs leave fp16's range: found, kept fp32, and then the graph is right; without, it is not."""
    graph = graphs["vision_encoder"]
    name = "vision.encoder.layers.1.self_attn.qkv"
    linear = graph.linears()[name]
    from lfm_quantize.graph import Tensor

    weight, bias = graph.weight(linear).copy(), graph.tensors[linear.bias].array.copy()
    weight[400] *= 3e5  # a channel of the values …
    bias[400] *= 3e5
    reader = graph.linears()["vision.encoder.layers.1.self_attn.out_proj"]
    back = graph.weight(reader).copy()
    back[:, 400 - 384] /= 3e5  # … read back as it was
    large = graph.replaced(
        {},
        {
            linear.weight: Tensor.of(np.ascontiguousarray(weight.T)),
            linear.bias: Tensor.of(bias),
            reader.weight: Tensor.of(np.ascontiguousarray(back.T)),
        },
    )
    wanted = whole(graph, view.feeds(), "image_features")
    np.testing.assert_allclose(whole(large, view.feeds(), "image_features"), wanted, atol=1e-3)
    stay = overflowing(large, [view.feeds()], 1)
    assert name in stay
    assert not overflowing(graph, [view.feeds()], 1)
    found = {}
    for label, kept in (("kept", stay), ("blind", [])):
        half(large, kept).save(tmp_path / f"{label}.onnx")
        (features,) = ort.InferenceSession(str(tmp_path / f"{label}.onnx")).run(None, view.feeds())
        found[label] = features
    assert cosines(found["kept"], wanted).min() > 0.9999
    assert not np.isfinite(found["blind"]).all() or cosines(found["blind"], wanted).min() < 0.99


def test_damaged_graph(demo_bundle, tmp_path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(QuantizeError, match="cannot be read"):
        Graph.open(tmp_path / "broken.onnx")
    (tmp_path / "vision_encoder.onnx").write_bytes((demo_bundle / "onnx" / "vision_encoder.onnx").read_bytes())
    (tmp_path / "vision_encoder.onnx_data").write_bytes(b"short")
    with pytest.raises(QuantizeError, match="cannot be read"):
        Graph.open(tmp_path / "vision_encoder.onnx")


def test_int8_products_do_not_overflow(tmp_path) -> None:
    """Largest weights meet largest inputs: on x86 without VNNI a pair of them leaves 16 bits, unless the runtime asks
    for exactness.
    """
    import onnxruntime as ort
    from lfm_quantize.passes.rewrite import quantized_nodes
    from lfm_quantize.rounding import Precision, rtn
    from lfm_runtime.engine.execution import Execution
    from onnx import helper

    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    weight = np.ones((8, 256), np.float32)
    linear = Linear("product", node, "w", True, 256, 8, None)
    nodes, tensors = quantized_nodes(linear, rtn(weight, Precision(8), None))
    edges = [helper.make_tensor_value_info(n, 1, [1, "tokens", size]) for n, size in (("x", 256), ("y", 8))]
    Graph("product", nodes, tensors, {"x": edges[0]}, edges[1:]).save(tmp_path / "product.onnx")
    x = np.ones((1, 3, 256), np.float32)
    (y,) = ort.InferenceSession(str(tmp_path / "product.onnx"), Execution(1).options()).run(None, {"x": x})
    np.testing.assert_allclose(y, x @ weight.T, rtol=0.01)
