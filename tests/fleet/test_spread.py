"""`lfm-edge quality` and `quantize --scheduler`: the numbers of one machine."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from clusters import PATIENCE_S, Cluster, start, until
from lfm_fleet.crew import ClusterError
from lfm_fleet.spread import workers
from lfm_quantize.calibrate.block import quantize_block
from lfm_quantize.calibrate.blocks import blocks_of
from lfm_quantize.calibrate.observe import Observed
from lfm_quantize.calibrate.samples import to_sample
from lfm_quantize.calibrate.spread import HERE
from lfm_quantize.calibrate.trail import Graphs, into_encoder
from lfm_quantize.recipe import Recipe
from lfm_quantize.source import Source
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.questions import Question
from pictures import IMAGES

FEW = 40


@pytest.fixture
def bundle(demo_bundle, tmp_path):
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    assert main(["quantize", str(tmp_path / "bundle"), "--variant", "int8", "--quiet"]) == 0
    return tmp_path / "bundle"


@pytest.fixture
def questions(tmp_path):
    """Some of the demo's, in a file of their own."""
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
    """Questions are answered and samples led through the layers there; it is the same variant but for roundings."""
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
            until(lambda name=name: cluster.has_registered(name), f"worker {name} has come")
        there = measured(["quantize", str(tmp_path / "there"), *words, "--scheduler", cluster.address])
    same = ("variant", "against", "questions", "images", "answer_tokens", "bytes", "bits_per_weight")
    assert {name: here[name] for name in same} == {name: there[name] for name in same}
    records = [
        json.loads((tmp_path / name / "manifest.json").read_text())["quantization"]["int4"]
        for name in ("here", "there")
    ]
    assert records[0]["calibration"] == records[1]["calibration"]
    pairs = list(zip(*(record["layers"] for record in records), strict=True))
    for one, other in pairs:
        assert {**one, "weight_error": 0, "smoothed": 0} == {**other, "weight_error": 0, "smoothed": 0}
    # A weight that lies between two integers may fall to either, and what is behind it is fed something else.
    errors = np.array([[layer["weight_error"] for layer in pair] for pair in pairs if pair[0]["weight_error"]])
    assert np.exp(np.log(errors[:, 1] / errors[:, 0]).mean()) == pytest.approx(1, abs=0.05)


@pytest.fixture
def samples(demo_bundle):
    """Questions with answers, two of them about one image."""
    bundle = Bundle.open(demo_bundle)
    asked = [Question(path, f"What is {i % 2}?") for i, path in enumerate([*IMAGES[:12], IMAGES[2]])]
    found = [to_sample(bundle, question, split=False) for question in asked]
    for sample in found:
        sample.ids += bundle.prompts.tokenizer.encode(" an answer")
    return found


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A cluster of three workers, as quantize reaches it, and of one that is somebody else's and has no lfm-edge."""
    with Cluster(tmp_path_factory.mktemp("three")) as started:
        for name in "abc":
            started.work(name)
        started.work("other", offers="", before="import sys; sys.modules['lfm_quantize'] = None")
        for name in ("a", "b", "c", "other"):
            until(lambda name=name: started.has_registered(name), f"worker {name} has come")
        with workers(started.address) as cluster:
            assert cluster.size == 3
            yield started, cluster


def test_what_layers_are_fed_is_summed_on_a_cluster(demo_bundle, samples, three) -> None:
    """The sums of one process, to what fp32 sums of the same numbers in another order differ by."""
    bundle = Bundle.open(demo_bundle)
    graphs, recipe = Graphs.of(Source.open(bundle, "int4")), Recipe.default("int4", "gptq", quick=True)
    trails = [into_encoder(where, bundle, "int4", graphs, samples, 1) for where in (HERE, three[1])]
    assert [len(trail.parts) for trail in trails] == [1, 3]
    for model in (graphs.vision, graphs.decoder):
        if model is graphs.decoder:
            trails = [trail.into_decoder(len(samples), None, bundle.prompts.image_id) for trail in trails]
        for block in blocks_of(model):
            change = quantize_block(model, block, trails[0], recipe)
            _same(*(trail.observe(block, dict.fromkeys(change.products, True)) for trail in trails))
            trails = [trail.advance(block, change.passes(tied=False)) for trail in trails]


def test_what_fails_on_a_worker_is_told(three) -> None:
    """Want of memory there is not this machine's."""
    cluster = three[1]
    with pytest.raises(ClusterError, match="has not enough memory for it; start workers with more"):
        list(cluster.results([cluster.call(bytes, 1 << 62)]))
    with pytest.raises(ClusterError, match="cannot do it \\(invalid literal"):
        list(cluster.results([cluster.call(int, "odd")]))
    assert list(cluster.results([cluster.call(abs, -2), cluster.call(abs, 3)])) == [2, 3]


def test_a_worker_that_leaves_with_samples_is_told(demo_bundle, samples, three) -> None:
    """The last test of the cluster: one of its workers is gone."""
    bundle = Bundle.open(demo_bundle)
    graphs = Graphs.of(Source.open(bundle, "int4"))
    first, second, third = blocks_of(graphs.vision)[:3]
    started, cluster = three
    trail = into_encoder(cluster, bundle, "int4", graphs, samples, 1)
    for block in (first, second):
        trail = trail.advance(block, [])
    trail.observe(third, dict.fromkeys(third.linears, True))
    started.workers[0].kill()
    with pytest.raises(ClusterError, match=r"left, and what it held is lost \(.*\); run again"):
        trail.observe(third, dict.fromkeys(third.linears, True))


def _same(one: dict[str, Observed], other: dict[str, Observed]) -> None:
    assert one.keys() == other.keys()
    for name, here in one.items():
        there = other[name]
        assert here.counts == there.counts
        np.testing.assert_array_equal(here.largest, there.largest)
        np.testing.assert_array_equal(np.sort(here.kept(), 0), np.sort(there.kept(), 0))
        for kind, moments in here.moments.items():
            difference = np.linalg.norm(moments - there.moments[kind]) / np.linalg.norm(moments)
            assert difference < 2e-6, (name, kind)
