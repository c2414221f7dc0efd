"""Portable graphs: a second way to the same contract. Against the built graphs and transformers; in onnx's reference
evaluator and in OpenVINO, which know standard operators alone; in the runtime, as any bundle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cache import cached_bundle
from model_card import card_answer

torch = pytest.importorskip("torch")
reference = pytest.importorskip("reference")
pytest.importorskip("optimum.exporters.onnx")
if reference.TRANSFORMERS_5:
    pytest.skip("Optimum's exporter needs transformers 4.57", allow_module_level=True)

from lfm_export import export as export_module  # noqa: E402
from lfm_export.checkpoint.config import CheckpointError  # noqa: E402
from lfm_export.export import export  # noqa: E402
from lfm_export.portable.portable import export_with_optimum  # noqa: E402
from lfm_package.verify import verify  # noqa: E402
from lfm_runtime.commands.cli import main  # noqa: E402
from lfm_runtime.formats.contract import present_name  # noqa: E402
from lfm_runtime.model import Model  # noqa: E402
from test_graph_parity import CASES, GRIDS, build, cosine, decode  # noqa: E402

STEMS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
QUESTION = "What is in this image?"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def portable(tmp_path_factory) -> Path:
    """The demo checkpoint, exported as portable graphs."""

    def make(folder: Path) -> None:
        export(reference.DEMO, folder, portable=True)

    return cached_bundle("portable", make, tmp_path_factory.mktemp("portable") / "bundle")


def sessions_of(bundle: Path) -> dict[str, ort.InferenceSession]:
    return {stem: ort.InferenceSession(bundle / "onnx" / f"{stem}.onnx") for stem in STEMS}


SPELLED = (
    "plain",
    "early hub spelling",
    "transformers 5 spelling",
    "untied head, as transformers 5 writes it",
    "bfloat16 in three shards",
)
"""Checkpoints that are written differently; the others differ in shape, and tracing each takes ten seconds: LONG=1."""


@pytest.fixture(
    scope="module",
    params=[name if name in SPELLED else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
    ids=lambda name: name.replace(" ", "_"),
)
def trio(request, tmp_path_factory):
    """(transformers' model, the built graphs, the portable graphs) of a tiny random checkpoint."""
    folder = tmp_path_factory.mktemp("case")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export_module, "add_golden", lambda *_: None)  # half of the time of these
        model, built = build(CASES[request.param], folder)
        export(folder / "checkpoint", folder / "portable", portable=True)
    return model, built, sessions_of(folder / "portable")


def test_features(trio) -> None:
    model, built, portable = trio
    pixels, grids, mask = reference.random_views(GRIDS)
    feeds = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids}
    a, b = (sessions["vision_encoder"].run(None, feeds)[0] for sessions in (built, portable))
    wanted = reference.image_features(model, pixels, grids, mask)
    for got in (a, wanted):
        assert cosine(b, got).min() >= 0.99999
        np.testing.assert_allclose(b, got, atol=1e-4)


def test_logits(trio) -> None:
    """Of a prompt, and after it was fed in any pieces."""
    model, built, portable = trio
    ids = np.random.default_rng(1).integers(8, 390, (1, 48))
    embeds = [sessions["embed_tokens"].run(None, {"input_ids": ids})[0] for sessions in (built, portable)]
    np.testing.assert_array_equal(*embeds)
    for length in (1, 2, 3, 48):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor(ids[:, :length])).logits.numpy()[0, -1]
        a, b = (
            decode(sessions["decoder_model_merged"], embeds[0][:, :length], [length]) for sessions in (built, portable)
        )
        np.testing.assert_allclose(b, a, atol=1e-4)
        np.testing.assert_allclose(b, wanted, atol=1e-4)
    for chunks in ([40] + [1] * 8, [1, 2, 3, 4, 38]):
        a, b = (decode(sessions["decoder_model_merged"], embeds[0], chunks) for sessions in (built, portable))
        np.testing.assert_allclose(b, a, atol=1e-4)


def test_padding_on_the_left(trio) -> None:
    """Batches as transformers pads them: what is masked has no effect, positions count what is not."""
    _, _, portable = trio
    decoder = portable["decoder_model_merged"]
    rng = np.random.default_rng(3)
    ids = rng.integers(8, 390, (2, 9))
    (embeds,) = portable["embed_tokens"].run(None, {"input_ids": ids})
    mask = np.ones((2, 9), np.int64)
    mask[1, :4] = 0
    past = {
        i.name: np.zeros(
            [n if isinstance(n, int) else (2 if axis == 0 else 0) for axis, n in enumerate(i.shape)], np.float32
        )
        for i in decoder.get_inputs()
        if i.name.startswith("past_")
    }
    (logits,) = decoder.run(["logits"], {"inputs_embeds": embeds, "attention_mask": mask, **past})
    whole, alone = decode(decoder, embeds[:1], [9]), decode(decoder, embeds[1:, 4:], [5])
    np.testing.assert_allclose(logits[0, -1], whole, atol=1e-4)
    np.testing.assert_allclose(logits[1, -1], alone, atol=1e-4)


def test_standard_operators_alone(portable) -> None:
    for stem in STEMS:
        model = onnx.load(portable / "onnx" / f"{stem}.onnx", load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        onnx.checker.check_model(str(portable / "onnx" / f"{stem}.onnx"), full_check=True)


def test_the_demo_model_answers_the_same(portable, demo_bundle, photo) -> None:
    """In the runtime, with the text of the built graphs; the bundle is one like others."""
    assert verify(portable) == []
    models = [Model.load(bundle, profile="generic") for bundle in (demo_bundle, portable)]
    for images in ([], [ROOT / "demo/eval/images/0000.png"], [photo, ROOT / "demo/eval/images/0001.png"]):
        built, traced = (m.answer(images, QUESTION, temperature=0, max_new_tokens=32).text() for m in models)
        assert traced == built
    manifest = json.loads((portable / "manifest.json").read_text())
    assert manifest["tool"]["optimum"]
    assert set(manifest["golden"]) == {"fp32"}


def test_model_card_snippet(portable) -> None:
    """The model card's snippet runs with portable graphs as it does with the built ones."""
    image = ROOT / "demo/eval/images/0003.png"
    wanted = Model.load(portable, profile="generic").answer([image], QUESTION, temperature=0).text()
    assert card_answer(portable, image, QUESTION) == wanted


class OpenVino:
    """A graph of a bundle in OpenVINO, behind onnxruntime's run()."""

    def __init__(self, path: Path) -> None:
        import openvino

        core = openvino.Core()
        self._compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self.inputs = [(value.any_name, value.partial_shape) for value in self._compiled.inputs]
        self.outputs = [value.any_name for value in self._compiled.outputs]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self._compiled(feeds)
        return {name: found[i] for i, name in enumerate(self.outputs)}


def test_openvino_answers_the_same(portable, demo_bundle) -> None:
    """A second engine, from patches to text: the answer of onnxruntime on the built graphs."""
    pytest.importorskip("openvino")
    graphs = {stem: OpenVino(portable / "onnx" / f"{stem}.onnx") for stem in STEMS}
    model = Model.load(demo_bundle, profile="generic")
    image = ROOT / "demo/eval/images/0000.png"
    wanted = model.answer([image], QUESTION, temperature=0, max_new_tokens=16).text()

    processor = reference.demo_processor()
    from PIL import Image

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[[Image.open(image).convert("RGB")]], text=[prompt], return_tensors="pt")
    vision = {name: inputs[name].numpy() for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
    features = graphs["vision_encoder"].run(
        {
            **vision,
            "pixel_values": vision["pixel_values"].astype(np.float32),
            "pixel_attention_mask": vision["pixel_attention_mask"].astype(np.int64),
            "spatial_shapes": vision["spatial_shapes"].astype(np.int64),
        }
    )["image_features"]
    ids = inputs["input_ids"].numpy()
    embeds = graphs["embed_tokens"].run({"input_ids": ids})["inputs_embeds"].copy()
    embeds[ids == processor.tokenizer.image_token_id] = features
    decoder = graphs["decoder_model_merged"]
    past = {
        name: np.zeros(
            [int(n.get_length()) if n.is_static else (1 if axis == 0 else 0) for axis, n in enumerate(shape)],
            np.float32,
        )
        for name, shape in decoder.inputs
        if name.startswith("past_")
    }
    said, length = [], 0
    while len(said) < 16:
        length += embeds.shape[1]
        found = decoder.run({"inputs_embeds": embeds, "attention_mask": np.ones((1, length), np.int64), **past})
        said.append(int(found["logits"][0, -1].argmax()))
        if said[-1] == processor.tokenizer.eos_token_id or said[-1] == 7:
            break
        past = {name: found[present_name(name)].copy() for name in past}
        embeds = graphs["embed_tokens"].run({"input_ids": np.array([said[-1:]])})["inputs_embeds"]
    assert processor.tokenizer.decode(said, skip_special_tokens=True) == wanted


def test_onnx_reference_evaluator(tmp_path) -> None:
    """onnx's own definition of every operator gives transformers' values in a tiny case."""
    from onnx.reference import ReferenceEvaluator

    model = reference.tiny_model()
    reference.save_tiny(model, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "bundle", portable=True)
    pixels, grids, mask = reference.random_views([(4, 6), (2, 2)])
    feeds = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids}
    (features,) = ReferenceEvaluator(str(tmp_path / "bundle/onnx/vision_encoder.onnx")).run(None, feeds)
    np.testing.assert_allclose(features, reference.image_features(model, pixels, grids, mask), atol=1e-4)
    ids = np.random.default_rng(1).integers(8, 390, (1, 7))
    (embeds,) = ReferenceEvaluator(str(tmp_path / "bundle/onnx/embed_tokens.onnx")).run(None, {"input_ids": ids})
    path = tmp_path / "bundle/onnx/decoder_model_merged.onnx"
    names = [i.name for i in ort.InferenceSession(path).get_inputs()]
    shapes = {i.name: i.shape for i in ort.InferenceSession(path).get_inputs()}
    past = {
        n: np.zeros([s if isinstance(s, int) else (1 if a == 0 else 0) for a, s in enumerate(shapes[n])], np.float32)
        for n in names
        if n.startswith("past_")
    }
    logits, *_ = ReferenceEvaluator(str(path)).run(
        None, {"inputs_embeds": embeds, "attention_mask": np.ones((1, 7), np.int64), **past}
    )
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor(ids)).logits.numpy()[0, -1]
    np.testing.assert_allclose(logits[0, -1], wanted, atol=1e-4)


def test_an_adapter_is_merged(tmp_path) -> None:
    """Portable graphs of an adapted checkpoint give the same logits as built ones."""
    peft = pytest.importorskip("peft")
    model = reference.tiny_model()
    reference.save_tiny(model, tmp_path / "checkpoint")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "w1", "in_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    for name, more in (("built", {}), ("portable", {"portable": True})):
        export(tmp_path / "checkpoint", tmp_path / name, adapter=tmp_path / "adapter", **more)
    embeds = np.random.default_rng(0).standard_normal((1, 6, 64)).astype(np.float32)
    a, b = (decode(sessions_of(tmp_path / name)["decoder_model_merged"], embeds, [6]) for name in ("built", "portable"))
    np.testing.assert_allclose(b, a, atol=1e-4)


# ------------------------------------------------------------------------------------------------ bad input


def test_what_does_not_go_together(tmp_path, capsys) -> None:
    for words in (["--dtype", "fp16"], ["--graphs", "vision_encoder"]):
        assert main(["export", str(reference.DEMO), "-o", str(tmp_path / "b"), "--portable", *words]) == 2
        assert "leave --dtype and --graphs out" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_quantize_says_what_it_needs(portable, capsys) -> None:
    assert main(["quantize", str(portable), "--variant", "int8", "--method", "rtn"]) == 2
    assert "is a portable graph, from which quantize can make only int8-static" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["optimum-onnx", "torch"])
def test_what_is_missing_is_named(missing, monkeypatch, tmp_path, capsys) -> None:
    from importlib.metadata import PackageNotFoundError

    real = export_module.version

    def version(name):
        if name == missing:
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(export_module, "version", version)
    assert main(["export", str(reference.DEMO), "-o", str(tmp_path / "b"), "--portable"]) == 2
    assert f"needs the Python package {missing}; install it with: " in capsys.readouterr().err
    monkeypatch.setattr(export_module, "version", lambda name: "5.1.0" if name == "transformers" else real(name))
    with pytest.raises(CheckpointError, match=r"needs transformers 4.57, but 5.1.0 is installed"):
        export(reference.DEMO, tmp_path / "b", portable=True)


def test_tools_that_cannot_be_imported(tmp_path) -> None:
    """The cause at the bottom, in one line, without touching the output."""
    (tmp_path / "optimum" / "exporters" / "onnx").mkdir(parents=True)
    (tmp_path / "optimum" / "exporters" / "onnx" / "__init__.py").write_text("raise RuntimeError('odd operator')\n")
    (tmp_path / "optimum" / "__init__.py").write_text("")
    (tmp_path / "optimum" / "exporters" / "__init__.py").write_text(
        "try:\n    raise RuntimeError('odd operator')\nexcept RuntimeError as e:\n    raise ImportError('no') from e\n"
    )
    words = ["export", str(reference.DEMO), "-o", str(tmp_path / "b"), "--portable"]
    code = f"import sys; sys.path[:0] = {[str(tmp_path), *sys.path]!r}; from lfm_runtime.commands.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot import what it needs (" in done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) < 400
    assert not (tmp_path / "b").exists()


def test_a_trace_that_fails_names_its_module(monkeypatch, tmp_path) -> None:
    from lfm_export.portable import portable

    def fails(*_, **__):
        raise RuntimeError("unsupported operator aten::odd")

    monkeypatch.setattr(portable, "export_models", fails)
    with pytest.raises(
        CheckpointError, match=r"vision_encoder could not be traced \(RuntimeError: unsupported operator aten::odd\)"
    ):
        export(reference.DEMO, tmp_path / "b", portable=True)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["transformers 5 spelling", "no projector norm"])
def test_optimums_own_export(name, tmp_path, monkeypatch) -> None:
    """The same configurations and submodels through Optimum's own function; checkpoints that transformers 4.57 would
    load wrong.
    """
    monkeypatch.setattr(export_module, "add_golden", lambda *_: None)
    _, built = build(CASES[name], tmp_path)
    export_with_optimum(str(tmp_path / "checkpoint"), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*.onnx")} == {f"{stem}.onnx" for stem in STEMS}
    pixels, grids, mask = reference.random_views(GRIDS)
    feeds = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids}
    got = ort.InferenceSession(tmp_path / "out" / "vision_encoder.onnx").run(None, feeds)[0]
    assert cosine(got, built["vision_encoder"].run(None, feeds)[0]).min() >= 0.99999
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "checkpoint" / "config.json").read_bytes()


def test_optimums_own_command_line(portable, tmp_path) -> None:
    """It finds our command, and its own check finds nothing wrong."""
    code = "import torchvision_shim, sys; from optimum.commands.optimum_cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", code, "export", "lfm2-vl", "--model", str(reference.DEMO), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "max diff" not in done.stderr, "Optimum's validation would warn"
    for stem in STEMS:
        a, b = (
            onnx.load(place, load_external_data=False)
            for place in (tmp_path / "out" / f"{stem}.onnx", portable / "onnx" / f"{stem}.onnx")
        )
        assert [i.name for i in a.graph.input] == [i.name for i in b.graph.input]
    assert (tmp_path / "out" / "config.json").exists()
    words[-2] = str(tmp_path)
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "config.json" in done.stderr.splitlines()[-1]
    with pytest.raises(CheckpointError, match="neither a folder nor a model that can be downloaded"):
        export_with_optimum("nobody/nothing", tmp_path / "other")
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
