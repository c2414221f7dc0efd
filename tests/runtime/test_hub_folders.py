"""Folders that other programs wrote, without a manifest, and what a model card's code does with ours."""

from __future__ import annotations

import os
import shutil

import pytest
from lfm_runtime import Model, PromptError
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import BundleError
from lfm_runtime.formats.onnx_file import check_external_files
from model_card import card_answer


@pytest.mark.parametrize("names", ["hub", "older"])
def test_a_hub_folder_runs_without_manifest(demo_bundle, demo_model, drawing, tmp_path, names) -> None:
    """Only the hub's files: no manifest, no prompt.json; also with the names older repositories use, beside
    config.json.
    """
    rename = (
        {"vision_encoder.onnx": "embed_images.onnx", "decoder_model_merged.onnx": "decoder.onnx"}
        if names == "older"
        else {}
    )
    target = tmp_path / "onnx" if names == "hub" else tmp_path
    target.mkdir(exist_ok=True)
    for path in (demo_bundle / "onnx").iterdir():
        shutil.copy(path, target / rename.get(path.name, path.name))
    for path in demo_bundle.iterdir():
        if path.is_file() and path.name not in ("manifest.json", "prompt.json"):
            shutil.copy(path, tmp_path / path.name)
    model = Model.load(tmp_path, threads=1)
    for question in ("What is in this image?", "How many shapes?", "naïve 日本?"):
        wanted, got = demo_model.answer([drawing], question), model.answer([drawing], question)
        assert got.text() == wanted.text()
        assert got.report.prompt_tokens == wanted.report.prompt_tokens


def test_hub_folder_without_a_tokenizer(demo_bundle, tmp_path) -> None:
    shutil.copytree(demo_bundle, tmp_path / "b")
    for name in ("manifest.json", "prompt.json", "tokenizer.json"):
        (tmp_path / "b" / name).unlink()
    with pytest.raises(PromptError, match=r"tokenizer\.json is missing"):
        Model.load(tmp_path / "b")


@pytest.mark.parametrize("graph", ["vision_encoder", "embed_tokens", "decoder_model_merged"])
def test_weights_that_are_missing_or_cut_off_are_named(demo_bundle, photo, tmp_path, capsys, graph) -> None:
    """Nothing tells sizes or hashes of a hub folder's files but the graphs themselves."""
    folder = tmp_path / "b"
    shutil.copytree(demo_bundle, folder, ignore=shutil.ignore_patterns("manifest.json", "prompt.json"))
    data = folder / "onnx" / f"{graph}.onnx_data"
    os.truncate(data, data.stat().st_size // 2)
    for says in (
        f"{data} is cut off: it has {data.stat().st_size} bytes, {graph}.onnx reads",
        f"{data} is missing, where",
    ):
        assert main(["run", str(folder), str(photo), "-p", "x", "--variant", "fp32"]) == 2
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
        assert main(["doctor", str(folder)]) == 1
        assert says in capsys.readouterr().out
        data.unlink(missing_ok=True)


def test_weights_in_a_folder_beside_the_graph(demo_bundle, drawing, demo_model, tmp_path) -> None:
    """As ONNX allows: a location is a path."""
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "b"
    shutil.copytree(demo_bundle, folder, ignore=shutil.ignore_patterns("manifest.json", "prompt.json"))
    graph = folder / "onnx" / "decoder_model_merged.onnx"
    model = onnx.load(graph, load_external_data=False)
    (folder / "onnx" / "weights").mkdir()
    graph.with_name("decoder_model_merged.onnx_data").rename(folder / "onnx" / "weights" / "data.bin")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.value == "decoder_model_merged.onnx_data":  # others are shared with the embeddings
                entry.value = "weights/data.bin"
    onnx.save(model, graph)
    wanted = demo_model.answer([drawing], "How many?").text()
    assert Model.load(folder, threads=1).answer([drawing], "How many?").text() == wanted
    (folder / "onnx" / "weights" / "data.bin").unlink()
    check_external_files.cache_clear()
    with pytest.raises(BundleError, match=r"weights/data\.bin is missing"):
        Model.load(folder, threads=1)


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "onnx/decoder_model_merged.onnx"])
def test_a_pipe_in_a_bundle_is_not_waited_for(demo_bundle, tmp_path, name) -> None:
    """An archive from elsewhere may have one; nobody writes into it."""
    shutil.copytree(demo_bundle, tmp_path / "b")
    (tmp_path / "b" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "b" / name)
    with pytest.raises(BundleError, match=f"{name} is not a plain file; remove it"):
        Bundle.open(tmp_path / "b")


def test_model_card_snippet(demo_bundle, demo_model, drawing) -> None:
    question = "What is in this image?"
    wanted = demo_model.answer([drawing], question, temperature=0).text()
    assert card_answer(demo_bundle, drawing, question) == wanted
