"""`lfm-edge quality` and `quantize --scheduler`: the numbers of one machine."""

from __future__ import annotations

import json
import shutil

import pytest
from clusters import PATIENCE_S, Cluster, start
from lfm_runtime.commands.cli import main

pytest.importorskip("onnx")
FEW = 40


@pytest.fixture
def bundle(demo_bundle, tmp_path):
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    assert main(["quantize", str(tmp_path / "bundle"), "--variant", "int8", "--quiet"]) == 0
    return tmp_path / "bundle"


@pytest.fixture
def questions(tmp_path):
    """Some of the demo's, in a file of their own."""
    from pictures import IMAGES

    place = IMAGES[0].parents[1] / "eval.jsonl"
    lines = [json.loads(line) for line in place.read_text().splitlines()[:FEW]]
    for line in lines:
        line["image"] = str(place.parent / line["image"])
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "questions.jsonl"


def measured(words: list[str]) -> dict:
    run = start(words)
    out, said = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, said
    return json.loads(out)


def test_quality_on_a_cluster(bundle, questions, tmp_path) -> None:
    words = [
        "quality",
        str(bundle),
        "--variant",
        "int8",
        "--images",
        str(questions),
        "--json",
        "--quiet",
        "--threads",
        "1",
    ]
    here = measured(words)
    with Cluster(tmp_path) as cluster:
        for name in "ab":
            cluster.work(name)
        there = measured([*words, "--scheduler", cluster.address])
    assert here["questions"] == FEW
    for name in here.keys() - {"seconds", "layers"}:
        if isinstance(here[name], float):
            assert there[name] == pytest.approx(here[name], abs=1e-6), name
        else:
            assert there[name] == here[name], name
    assert [layer["name"] for layer in there["layers"]] == [layer["name"] for layer in here["layers"]]


def test_calibration_on_a_cluster(demo_bundle, tmp_path) -> None:
    """The questions are answered there; the variant is the same, file by file."""
    from pictures import IMAGES

    (tmp_path / "images.txt").write_text("".join(f"{path}\n" for path in IMAGES[:24]))
    words = [
        "--variant",
        "int4",
        "--calibration",
        str(tmp_path / "images.txt"),
        "--quick",
        "--json",
        "--quiet",
        "--threads",
        "1",
    ]
    for name in ("here", "there"):
        shutil.copytree(demo_bundle, tmp_path / name)
    here = measured(["quantize", str(tmp_path / "here"), *words])
    with Cluster(tmp_path) as cluster:
        for name in "ab":
            cluster.work(name)
        there = measured(["quantize", str(tmp_path / "there"), *words, "--scheduler", cluster.address])
    assert {name: here[name] for name in here if name != "seconds"} == {
        name: there[name] for name in there if name != "seconds"
    }
    files = [json.loads((tmp_path / name / "manifest.json").read_text())["files"] for name in ("here", "there")]
    assert files[0] == files[1]
