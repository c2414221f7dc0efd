"""Graphs cut in parts: parts add up to the whole, equivalent changes change nothing, fp16 graphs are what fp32 ones say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphs import model_of
from lfm_export.export import export
from lfm_quantize.calibrate.blocks import FedGraph, blocks_of, decoder_feeds
from lfm_quantize.calibrate.overflow import overflowing
from lfm_quantize.calibrate.samples import View
from lfm_quantize.calibrate.smooth import fold, sources
from lfm_quantize.graph import QuantizeError, linears, open_graph, save, session
from lfm_quantize.judge.distances import cosines
from lfm_quantize.passes.constants import Constants
from lfm_quantize.passes.half import Half
from lfm_quantize.passes.likeliest import Likeliest
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.passes.positions import AllPositions
from lfm_quantize.passes.widen import Widen
from lfm_quantize.quantize import quantize
from lfm_quantize.settings import Settings
from lfm_runtime import Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.formats.contract import DECODER

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def graphs(demo_bundle) -> dict[str, ir.Model]:
    return {stem: open_graph(path) for stem, path in Bundle.open(demo_bundle).variants["fp32"].items()}


@pytest.fixture(scope="module")
def view() -> View:
    return View(np.random.default_rng(0).uniform(-1, 1, (8 * 12, 768)).astype(np.float32), 8, 12)


@pytest.fixture(scope="module")
def embeds() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, 30, 256)).astype(np.float32)


def whole(graph: ir.Model, feeds, output: str) -> np.ndarray:
    names = {value.name for value in graph.graph.inputs}
    return session(graph, 1).run([output], {n: v for n, v in feeds.items() if n in names})[0]


def test_blocks_in_a_row_are_the_graph(demo_bundle, graphs, view, embeds) -> None:
    """Against onnxruntime on the untouched files; the decoder's last position, which is all that the file gives out."""
    files = Bundle.open(demo_bundle).variants["fp32"]
    vision, decoder = graphs["vision_encoder"], rewritten(graphs["decoder_model_merged"], AllPositions())
    for graph, feeds, stem, output in (
        (vision, view.feeds(), "vision_encoder", "image_features"),
        (decoder, decoder_feeds(decoder, embeds), "decoder_model_merged", "logits"),
    ):
        blocks = blocks_of(graph)
        assert {name for block in blocks for name in block.linears} == set(linears(graph))
        fed = FedGraph(graph, [feeds], [], 1)
        states = fed.start()
        for block in blocks:
            states = fed.run(block, states)
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
            (images,) if images else (),
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
    rng = np.random.default_rng(7)
    prompts = [rng.integers(1, 400, rng.integers(3, 12)).tolist() for _ in range(50)]
    a, b = (
        np.stack([np.array(m.decoder.start(16).step(m.decoder.embed(ids))) for ids in prompts]) for m in (exact, model)
    )
    # Random weights, 64 wide: 4 bits tell, and of single prompts one in 25 is below 0.9.
    assert cosines(a, b).mean() > (0.94 if variant == "int4" else 0.999)


@pytest.mark.parametrize("stem", ["vision_encoder", "decoder_model_merged"])
@pytest.mark.parametrize("which", ["demo", "unlike"])
def test_factors_change_nothing(graphs, unlike, view, which, stem) -> None:
    """Random factors on every product that has a source, folded into it: the same outputs in fp32."""
    graph = graphs[stem] if which == "demo" else open_graph(Bundle.open(unlike).variants["fp32"][stem])
    width = 256 if which == "demo" else 64
    embeds = np.random.default_rng(1).standard_normal((1, 30, width)).astype(np.float32)
    feeds = view.feeds() if stem == "vision_encoder" else decoder_feeds(graph, embeds)
    where, products = sources(graph), linears(graph)
    if which == "demo":
        assert len(where) == len(products) - len(
            [n for n in products if n.endswith(("fc2", "patch_embedding", "linear_2", "head"))]
        )
    rng = np.random.default_rng(2)
    factors = {
        name: source.tie(np.exp(rng.normal(0, 1, products[name].k)).astype(np.float32))
        for name, source in where.items()
    }
    folded = fold(graph, factors)

    def changed() -> ir.Model:
        constants = {str(products[n].weight.name): products[n].stored(w) for n, w in folded.weights.items()}
        return rewritten(graph, Constants({**constants, **folded.vectors}))

    output = graph.graph.outputs[0].name
    wanted = whole(graph, feeds, output)
    np.testing.assert_allclose(whole(changed(), feeds, output), wanted, atol=2e-4 * np.abs(wanted).max())
    folded.weights[next(iter(where))] *= 1.1  # and the test can fail
    assert np.abs(whole(changed(), feeds, output) - wanted).max() > 1e-3 * np.abs(wanted).max()


def test_written_and_read_again(graphs, embeds, tmp_path) -> None:
    graph = graphs["decoder_model_merged"]
    save(graph, tmp_path / "again.onnx")
    feeds = decoder_feeds(graph, embeds)
    (got,) = ort.InferenceSession(str(tmp_path / "again.onnx")).run(["logits"], feeds)
    np.testing.assert_allclose(got, whole(graph, feeds, "logits"), atol=1e-4)


def test_half_is_the_exporters_half(graphs, view, embeds, tmp_path) -> None:
    """Same types at the edges as the fp16 graphs of lfm-edge export, and the same numbers to fp16's precision."""
    export(ROOT / "demo" / "checkpoint", tmp_path / "bundle", dtype="fp16")
    for stem, path in Bundle.open(tmp_path / "bundle").variants["fp16"].items():
        made = rewritten(graphs[stem], Half(), *([Likeliest()] if stem == DECODER.stem else ()))
        save(made, tmp_path / f"{stem}.onnx")
        ours, theirs = (ort.InferenceSession(str(p)) for p in (tmp_path / f"{stem}.onnx", path))
        for edges in ("get_inputs", "get_outputs"):
            wanted = {(e.name, e.type) for e in getattr(theirs, edges)()}
            assert {(e.name, e.type) for e in getattr(ours, edges)()} == wanted
        feeds = view.feeds() if stem == "vision_encoder" else {"input_ids": np.arange(40)[None]}
        if stem.startswith("decoder"):
            feeds = decoder_feeds(open_graph(path), embeds)
        a, b = ours.run(None, feeds)[0], theirs.run(None, feeds)[0]
        assert cosines(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])).min() > 0.99999
    # An fp16 file read as fp32 is the fp32 graph again, but for the weights' rounding: this checkpoint has none.
    widened = rewritten(open_graph(Bundle.open(tmp_path / "bundle").variants["fp16"]["vision_encoder"]), Widen())
    np.testing.assert_allclose(
        whole(widened, view.feeds(), "image_features"),
        whole(graphs["vision_encoder"], view.feeds(), "image_features"),
        atol=1e-3,
    )


def test_what_overflows_stays_fp32(graphs, view, tmp_path) -> None:
    """A projection whose outputs leave fp16's range: found, kept fp32, and then the graph is right; without, it is not."""
    graph = graphs["vision_encoder"]
    name = "vision.encoder.layers.1.self_attn.qkv"
    linear = linears(graph)[name]
    weight, bias = linear.weights().copy(), graph.graph.initializers[linear.bias].const_value.numpy().copy()
    weight[400] *= 3e5  # a channel of the values …
    bias[400] *= 3e5
    reader = linears(graph)["vision.encoder.layers.1.self_attn.out_proj"]
    back = reader.weights().copy()
    back[:, 400 - 384] /= 3e5  # … read back as it was
    changes = {linear.weight.name: linear.stored(weight), linear.bias: bias, reader.weight.name: reader.stored(back)}
    large = rewritten(graph, Constants(changes))
    wanted = whole(graph, view.feeds(), "image_features")
    np.testing.assert_allclose(whole(large, view.feeds(), "image_features"), wanted, atol=1e-3)
    stay = overflowing(FedGraph(large, [view.feeds()], [], 1))
    assert name in stay
    assert not overflowing(FedGraph(graph, [view.feeds()], [], 1))
    found = {}
    for label, kept in (("kept", stay), ("blind", [])):
        save(rewritten(large, Half(kept)), tmp_path / f"{label}.onnx")
        (features,) = ort.InferenceSession(str(tmp_path / f"{label}.onnx")).run(None, view.feeds())
        found[label] = features
    assert cosines(found["kept"], wanted).min() > 0.9999
    assert not np.isfinite(found["blind"]).all() or cosines(found["blind"], wanted).min() < 0.99


def test_damaged_graph(demo_bundle, tmp_path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(QuantizeError, match="cannot be read"):
        open_graph(tmp_path / "broken.onnx")
    (tmp_path / "vision_encoder.onnx").write_bytes((demo_bundle / "onnx" / "vision_encoder.onnx").read_bytes())
    (tmp_path / "vision_encoder.onnx_data").write_bytes(b"short")
    with pytest.raises(QuantizeError, match="cannot be read"):
        open_graph(tmp_path / "vision_encoder.onnx")


def test_session_copies_nothing_of_the_file(tmp_path) -> None:
    """A session over 64 MB of weights in a data file maps them: it adds far less anonymous memory."""
    text = "one (float[rows, 4096] x) => (float[rows, 4096] y) { [layer] y = MatMul (x, w) }"
    save(model_of(text, w=np.ones((4096, 4096), np.float32)), tmp_path / "one.onnx")
    code = f"""
import psutil, pathlib, numpy as np
from lfm_quantize.graph import open_graph, session
own = lambda: (m := psutil.Process().memory_full_info()).rss - m.shared
graph = open_graph(pathlib.Path({str(tmp_path / "one.onnx")!r}))
before = own()
running = session(graph, 1)
out = running.run(None, {{"x": np.ones((1, 4096), np.float32)}})[0]
assert (out == 4096).all()
print((own() - before) >> 20)
"""
    used = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert used < 24
