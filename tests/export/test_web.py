"""Bundles for browsers: each decoder with its own copy of the table, the same answers; and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnxruntime as ort
import pytest
from lfm_runtime import Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.formats.onnx_file import external_files

PICTURE = Path(__file__).resolve().parents[2] / "demo" / "eval" / "images" / "0000.png"


def test_a_bundle_for_browsers(demo_bundle, demo_model, tmp_path, capsys) -> None:
    """It is a bundle: whole, with the same answers here; no graph needs the data of another."""
    source = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    assert main(["quantize", str(source), "--variant", "int4", "--quiet"]) == 0
    web = tmp_path / "web"
    assert main(["export", str(source), "--web", "-o", str(web)]) == 0
    assert main(["verify", str(web)]) == 0
    assert main(["verify", str(source)]) == 0
    assert set(Bundle.open(web).variants) == {"fp32", "int4"}
    for graph in (web / "onnx").glob("*.onnx"):
        assert external_files(graph) <= {f"{graph.name}_data"}
    outputs = {o.name for o in ort.InferenceSession(str(web / "onnx" / "decoder_model_merged.onnx")).get_outputs()}
    assert not {name for name in outputs if name.startswith("conv_input")}
    model, question = Model.load(web, variant="fp32", threads=1), "What is in this image?"
    assert model.answer([PICTURE], question).text() == demo_model.answer([PICTURE], question).text()
    assert not model.setup.verifies
    assert main(["export", str(source), "--web", "-o", str(web)]) == 0, "it may be written again"
    for there, says in ((shutil.copytree(source, tmp_path / "other"), "export --web did not write"), (web, "int4")):
        before = sorted(path.name for path in there.rglob("*"))
        assert main(["export", str(demo_bundle), "--web", "-o", str(there)]) == 2
        assert says in capsys.readouterr().err
        assert sorted(path.name for path in there.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--portable"], "--portable has no effect beside --web"),
        (["--dtype", "fp16"], "--dtype has no effect beside --web"),
        (["--static"], "--static and --web exclude each other"),
        (["--grid", "4x4"], "--grid has no effect without --static"),
    ],
)
def test_flags_that_are_about_something_else(demo_bundle, tmp_path, capsys, words, says) -> None:
    assert main(["export", str(demo_bundle), "--web", *words, "-o", str(tmp_path / "web")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "web").exists()


def test_only_a_bundle_becomes_one_for_browsers(demo_bundle, tmp_path, capsys) -> None:
    checkpoint = Path(__file__).resolve().parents[2] / "demo" / "checkpoint"
    assert main(["export", str(checkpoint), "--web", "-o", str(tmp_path / "web")]) == 2
    assert "is a checkpoint, not a bundle" in capsys.readouterr().err
    assert main(["export", str(demo_bundle), "--web", "-o", str(demo_bundle)]) == 2
    assert "is the bundle itself" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert main(["export", str(demo_bundle), "--web", "-o", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
