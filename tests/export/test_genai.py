"""Folders for onnxruntime-genai: the decoder that its own builder makes, read by us; ours, read by its own runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lfm_runtime import Model
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import BundleError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime_genai")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

pytestmark = [pytest.mark.process, pytest.mark.transformers5, pytest.mark.transformers5_alone]
ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "demo" / "checkpoint"
BUILDER = """
import runpy, sys
import torchvision_shim
sys.argv = ["builder", *sys.argv[1:]]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
"""


def embeddings(bundle: Path, path: Path, image_id: int) -> None:
    """Token embeddings with image features in their places, as a stage of a genai pipeline."""
    model = onnx.load(bundle / "onnx" / "embed_tokens.onnx")
    table = numpy_helper.to_array(model.graph.initializer[0])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embeds"]),
        helper.make_node("Equal", ["input_ids", "image"], ["there"]),
        helper.make_node("NonZero", ["there"], ["where"]),
        helper.make_node("Transpose", ["where"], ["places"], perm=[1, 0]),
        helper.make_node("ScatterND", ["embeds", "places", "image_features"], ["inputs_embeds"]),
    ]
    hidden = table.shape[1]
    graph = helper.make_graph(
        nodes,
        "embeddings",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["num_image_tokens", hidden]),
        ],
        [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["batch_size", "sequence_length", hidden])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array(image_id, np.int64), "image")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@pytest.fixture(scope="module")
def genai(demo_bundle, tmp_path_factory) -> Path:
    """Its builder's decoder, our encoder, and embeddings as it wants them; no config.json."""
    folder = tmp_path_factory.mktemp("genai") / "model"
    words = ["-i", str(CHECKPOINT), "-o", str(folder), "-p", "fp32", "-e", "cpu", "-c", str(folder.parent / "cache")]
    words += ["--extra_options", "exclude_embeds=true"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "demo" / "make"), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", BUILDER, *words], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("vision_encoder.onnx", "vision_encoder.onnx_data"):
        shutil.copy(demo_bundle / "onnx" / name, folder)
    config = json.loads((folder / "genai_config.json").read_text())
    image_id = json.loads((CHECKPOINT / "config.json").read_text())["image_token_id"]
    embeddings(demo_bundle, folder / "embeddings.onnx", image_id)
    config["model"]["vision"] = {"filename": "vision_encoder.onnx"}
    config["model"]["embedding"] = {"filename": "embeddings.onnx"}
    (folder / "genai_config.json").write_text(json.dumps(config))
    shutil.copy(CHECKPOINT / "preprocessor_config.json", folder)
    return folder


def test_its_decoder_gives_our_texts(genai, demo_model) -> None:
    """100 demo questions."""
    assert not (genai / "config.json").exists()
    lines = (ROOT / "demo" / "eval" / "eval.jsonl").read_text().splitlines()
    model = Model.load(genai, threads=1)
    for line in lines[:: len(lines) // 100][:100]:
        asked = json.loads(line)
        image = ROOT / "demo" / "eval" / str(asked["image"])
        wanted, said = (m.answer([image], asked["question"], temperature=0).text() for m in (demo_model, model))
        assert said == wanted, asked


def test_sizes_that_its_graph_leaves_open(genai, demo_model, tmp_path) -> None:
    """genai_config.json tells them: a convolution keeps one position less than in our graphs."""
    folder = Path(shutil.copytree(genai, tmp_path / "open"))
    graph = folder / json.loads((genai / "genai_config.json").read_text())["model"]["decoder"]["filename"]
    model = onnx.load(graph, load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        for n, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value > 1:
                dim.dim_param = f"{value.name}.{n}"
    onnx.save(model, graph)
    image = ROOT / "demo" / "eval" / "images" / "0000.png"
    wanted, said = (
        m.answer([image], "What is in this image?", temperature=0).text()
        for m in (demo_model, Model.load(folder, threads=1))
    )
    assert said == wanted


@pytest.mark.parametrize(("variant", "same"), [("fp32", 100), ("int8", 99), ("int4", 99)])
def test_its_runtime_answers_from_our_folders(demo_bundle, tmp_path, variant, same) -> None:
    """The other way: `export --genai`, and onnxruntime-genai's own runtime, on the same questions."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    if variant != "fp32":
        assert main(["quantize", str(bundle), "--variant", variant, "--quiet"]) == 0
    assert main(["export", str(bundle), "--genai", "--variant", variant, "-o", str(tmp_path / "genai")]) == 0
    lines = (ROOT / "demo" / "eval" / "eval.jsonl").read_text().splitlines()
    asked = [json.loads(line) for line in lines[:: len(lines) // 100][:100]]
    asked = [{"image": str(ROOT / "demo" / "eval" / str(q["image"])), "question": q["question"]} for q in asked]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    words = [str(ROOT / "tests" / "genai_answers.py"), str(tmp_path / "genai"), str(tmp_path / "questions.json")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    model = Model.load(bundle, variant=variant, threads=1)
    wanted = [
        model.answer([q["image"]], q["question"], temperature=0, repetition_penalty=1.0, max_new_tokens=24).text()
        for q in asked
    ]
    assert sum(a == b for a, b in zip(said, wanted, strict=True)) >= same
    ours = Model.load(tmp_path / "genai", threads=1)
    assert ours.setup.variant == variant
    assert ours.answer([asked[0]["image"]], asked[0]["question"], temperature=0).text() == wanted[0], "and we read it"


def test_such_a_folder_is_not_written_over_another(demo_bundle, tmp_path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert main(["export", str(demo_bundle), "--genai", "-o", str(tmp_path / "mine")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert main(["export", str(demo_bundle), "--genai", "--variant", "int8", "-o", str(tmp_path / "g")]) == 2
    assert "has no variant 'int8'" in capsys.readouterr().err
    assert main(["export", str(demo_bundle), "--genai", "--web", "-o", str(tmp_path / "g")]) == 2
    assert "--web and --genai exclude each other" in capsys.readouterr().err
    assert main(["export", str(CHECKPOINT), "--variant", "int8", "-o", str(tmp_path / "g")]) == 2
    assert "--variant has no effect without --genai" in capsys.readouterr().err
    assert not (tmp_path / "g").exists()


def test_what_is_wrong_with_such_a_folder(genai, tmp_path, capsys) -> None:
    text = json.loads((genai / "genai_config.json").read_text())
    changes = {
        "model.type is 'phi3'": lambda model: model.update(type="phi3"),
        "names no graph for model.vision": lambda model: model.pop("vision"),
        "x.onnx is missing": lambda model: model["decoder"].update(filename="x.onnx"),
        "names no graph for model.embedding": lambda model: model["embedding"].update(filename="../x.onnx"),
        "has a wrong or missing value": lambda model: model["decoder"].pop("hidden_size"),
    }
    for number, (said, change) in enumerate(changes.items()):
        folder = Path(shutil.copytree(genai, tmp_path / str(number)))
        wrong = json.loads(json.dumps(text))
        change(wrong["model"])
        (folder / "genai_config.json").write_text(json.dumps(wrong))
        assert main(["run", str(folder), "-p", "x"]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    with pytest.raises(BundleError):
        Model.load(tmp_path / "0")
