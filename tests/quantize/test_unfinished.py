"""A run that is killed, meets bad input or a full disk: the bundle is as it was, and the next run goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from bundles import read_manifest, tree
from lfm_quantize import variant as variant_files
from lfm_quantize.graph import QuantizeError, open_graph
from lfm_quantize.make import integers
from lfm_quantize.quantize import quantize
from lfm_quantize.settings import Settings
from lfm_runtime.commands.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_a_killed_run_goes_on_where_it_was(demo_bundle, few, tmp_path, monkeypatch, capsys) -> None:
    settings = Settings("int4", (few / "images",), few / "calibration.jsonl", method="gptq")
    undisturbed = Path(shutil.copytree(demo_bundle, tmp_path / "undisturbed"))
    quantize(undisturbed, settings)
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    before = tree(bundle)
    blocks: list[str] = []
    real = integers.quantize_block
    monkeypatch.setattr(
        integers,
        "quantize_block",
        lambda model, block, *rest: (blocks.append(block.name), real(model, block, *rest))[1],
    )

    def kill(what: str, done: int, _: int) -> None:
        if what == "quantizes decoder_model_merged" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(bundle, settings, kill)
    words = [
        "quantize",
        str(bundle),
        "--variant",
        "int4",
        "--calibration",
        str(few / "images"),
        "--method",
        "gptq",
        "--quiet",
    ]
    with monkeypatch.context() as interrupted:
        interrupted.setattr("lfm_quantize.quantize.quantize", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words) == 130
    assert f"work, which lfm-edge clean {bundle} removes" in capsys.readouterr().err
    assert tree(bundle) == before
    first, blocks[:] = list(blocks), []
    (damaged,) = tmp_path.glob(".bundle.int4-work/vision.encoder.layers.1")
    os.truncate(damaged / "0.codes.npy", 60)
    quantize(bundle, settings)
    assert len(first) == 9
    assert len(blocks) == 5
    assert set(first) & set(blocks) == {damaged.name}
    onnx_files = lambda folder: {n: h for n, h in tree(folder).items() if n.startswith("onnx/")}  # noqa: E731
    assert onnx_files(bundle) == onnx_files(undisturbed)
    assert not list(tmp_path.glob(".*"))  # nothing left beside the bundles

    with pytest.raises(KeyboardInterrupt):
        quantize(bundle, settings, kill)
    blocks.clear()
    quantize(
        bundle, Settings("int4", (few / "images",), few / "calibration.jsonl", method="gptq", keep=("head",))
    )  # another recipe: from the start
    assert len(blocks) == 13


def test_two_runs_at_once(demo_bundle, few, tmp_path) -> None:
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))

    def again(what: str, done: int, _: int) -> None:
        if what == "quantizes vision_encoder" and done == 1:
            with pytest.raises(QuantizeError, match="another run is making int8"):
                quantize(bundle, Settings("int8", (few / "images",), few / "calibration.jsonl"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(bundle, Settings("int8", (few / "images",), few / "calibration.jsonl"), again)


def test_a_damaged_variant_is_made_again(quantized, tmp_path, capsys) -> None:
    """What is replaced need not be whole; everything else must be."""
    bundle = Path(shutil.copytree(quantized, tmp_path / "bundle"))
    data = bundle / "onnx" / "decoder_model_merged_int8.onnx_data"
    os.truncate(data, data.stat().st_size // 2)
    assert main(["quantize", str(bundle), "--variant", "int8", "--force", "--quiet"]) == 0
    assert main(["verify", str(bundle)]) == 0
    data = bundle / "onnx" / "decoder_model_merged.onnx_data"
    os.truncate(data, data.stat().st_size // 2)
    capsys.readouterr()
    assert main(["quantize", str(bundle), "--variant", "int8", "--force", "--quiet"]) == 2
    assert "decoder_model_merged.onnx_data" in capsys.readouterr().err


def remove_fp32(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["variants"] = {"int8": manifest["variants"]["fp32"]}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def put_nan(bundle: Path) -> None:
    path = bundle / "onnx" / "decoder_model_merged.onnx"
    tensor = open_graph(path).graph.initializers["text.layers.2.conv.in_proj.weight"].const_value
    with (bundle / "onnx" / "decoder_model_merged.onnx_data").open("r+b") as file:
        file.seek(tensor.offset)
        file.write(np.array([np.nan], np.float32).tobytes())


BREAK = {
    "no bundle": (shutil.rmtree, "does not exist"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "has no manifest.json"),
    "no fp32": (remove_fp32, "fp16 weights to start from; add them: lfm-edge export CHECKPOINT -o "),
    "NaN": (put_nan, "text.layers.2.conv.in_proj has NaN or infinite weights"),
    "truncated graph": (lambda b: (b / "onnx/vision_encoder.onnx").write_bytes(b"x"), "has 1 bytes"),
}


@pytest.mark.parametrize("case", BREAK, ids=lambda name: name.replace(" ", "_"))
def test_bad_bundle(case, demo_bundle, tmp_path, capsys, monkeypatch) -> None:
    breaking, says = BREAK[case]
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    if case == "NaN":  # larger files are hashed only when asked; this one is small
        monkeypatch.setattr("lfm_runtime.bundle.HASHED_AT_LOAD", 0)
    breaking(bundle)
    before = tree(bundle)
    assert main(["quantize", str(bundle), "--variant", "int4", "--quiet"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("lfm-edge: ")
    assert says in err[-1]
    assert tree(bundle) == before


def test_a_variant_is_not_made_from_itself(demo_bundle, tmp_path, capsys) -> None:
    """In a bundle as export --dtype fp16 makes it."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["variants"] = {"fp16": manifest["variants"]["fp32"]}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert main(["quantize", str(bundle), "--variant", "fp16"]) == 2
    assert "has fp16 from lfm-edge export and nothing finer to make it from" in capsys.readouterr().err


def test_a_refused_quantization_leaves_the_bundle_as_it_was(demo_bundle, tmp_path, capsys, monkeypatch) -> None:
    """Each one line, exit 2, the bundle as before."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    before = tree(bundle)
    (tmp_path / "empty").mkdir()
    (tmp_path / "typo.toml").write_text('[[layer]]\npattern = "vison.*"\nbits = 8\n')
    for arguments, says in (
        (["--variant", "int5"], "unknown variant 'int5'"),
        (["--variant", "int4", "--method", "best"], "unknown method 'best'"),
        (["--variant", "int4", "--keep", "text.layers.77.*"], "matches no layer"),
        (
            ["--variant", "int4", "--recipe", str(tmp_path / "typo.toml")],
            "typo.toml: pattern 'vison.*' matches no layer",
        ),
        (["--variant", "int4", "--calibration", str(tmp_path / "empty")], "has no usable image"),
    ):
        assert main(["quantize", str(bundle), *arguments]) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20))
    assert main(["quantize", str(bundle), "--variant", "int4"]) == 2
    assert "has 1 MiB free" in capsys.readouterr().err
    assert tree(bundle) == before


def test_disk_full_while_writing(demo_bundle, tmp_path, monkeypatch, capsys) -> None:
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    before = tree(bundle)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(variant_files, "save", full)
    assert main(["quantize", str(bundle), "--variant", "int8", "--quiet"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert tree(bundle) == before
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_few_and_broken_images_are_said(demo_bundle, few, tmp_path, capsys) -> None:
    """Three pictures, a copy and a broken one: three warnings, and a variant all the same."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    (tmp_path / "images").mkdir()
    for path in sorted((few / "images").iterdir())[:3]:
        shutil.copy(path, tmp_path / "images")
    shutil.copy(path, tmp_path / "images" / "copy.jpg")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert (
        main(["quantize", str(bundle), "--variant", "fp16", "--calibration", str(tmp_path / "images"), "--quiet"]) == 0
    )
    captured = capsys.readouterr()
    assert "1 of 5 images are left out: broken.jpg could not be opened" in captured.err
    assert "1 of 4 images are copies: they add nothing" in captured.err
    assert "only 3 usable images" in captured.err
    assert "fp16 against fp32" in captured.out
    found = read_manifest(bundle)["quantization"]["fp16"]["calibration"]
    assert len(set(found.pop("sha256"))) == 3
    assert found == {"images": 3, "questions": 3, "skipped": 1}


def test_less_care_does_not_replace_more(demo_bundle, tmp_path, capsys) -> None:
    """A variant that was calibrated is not lost to a run without images, nor a full run's to a quick one."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    made = {"calibration": {"images": 48, "questions": 48, "skipped": 0}, "quick": False}
    manifest["quantization"], manifest["quality"] = {"int8": made}, {"int8": {"kl": 0.001}}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    words = ["quantize", str(bundle), "--variant", "int8", "--quiet"]
    photos = ["--calibration", str(ROOT / "demo" / "photos"), "--quick"]
    for more, says in (([], "name --calibration images, or replace it with --force"), (photos, "leave --quick out")):
        before = tree(bundle)
        assert main([*words, *more]) == 2
        said = capsys.readouterr().err
        assert "int8 is there, calibrated and judged (KL 0.001)" in said
        assert says in said
        assert tree(bundle) == before
    assert main([*words, *photos[:2]]) == 2, "three photos are fewer than 48"
    assert "calibrated with 48 images, and this run has" in capsys.readouterr().err
    assert tree(bundle) == before
    assert main([*words, "--force"]) == 0
