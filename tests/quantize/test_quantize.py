"""The whole stage on the demo model: floors, manifest, resuming, the gate, the commands, bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import read_manifest
from lfm_export.export import export
from lfm_quantize import variant as variant_files
from lfm_quantize.calibrate.samples import to_sample
from lfm_quantize.graph import QuantizeError, linears, open_graph, session
from lfm_quantize.judge.distances import cosines, kl_divergence, standard_error
from lfm_quantize.judge.measure import measure
from lfm_quantize.judge.quality import GateError, with_error
from lfm_quantize.make import integers
from lfm_quantize.passes.integers import Integers, Product
from lfm_quantize.passes.nodes import exchange, node, rewritten
from lfm_quantize.quantize import quantize
from lfm_quantize.rounding import Precision, rtn
from lfm_quantize.settings import Settings
from lfm_runtime import Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.formats.manifest import Manifest, file_hash
from lfm_runtime.questions import Question
from lfm_runtime.setup.resolve import resolve
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "demo" / "checkpoint"


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}


# ----------------------------------------------------------------------------------------------------------- floors

FLOORS = {  # lowest cosine min and mean, highest KL and points lost, largest size
    "int8": (0.998, 0.9995, 0.0005, 0.3, 0.27),
    "int4": (0.998, 0.9995, 0.0015, 0.7, 0.18),
    "fp16": (0.9999, 0.9999, 1e-5, 0.0, 0.51),
}


def check_floors(quality, variant: str, noise: float = 0.0) -> None:
    """`noise`: points that chance may take beside the floor."""
    least, mean, kl, lost, size = FLOORS[variant]
    assert quality.cosine_min >= least
    assert quality.cosine_mean >= mean
    assert quality.kl <= kl
    assert quality.accuracy_lost() <= lost + noise
    assert quality.bytes / quality.against_bytes <= size


@pytest.mark.parametrize("variant", FLOORS)
def test_floors(quantized, questions, variant) -> None:
    """On half of the stored questions, none of whose pictures calibration saw. Of 240, one is 0.4 points, and which one
    flips depends on the processor that calibrated; 2,000 decide (below).
    """
    check_floors(measure(quantized, variant, "fp32", questions[1][::2], 2), variant, noise=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("variant", FLOORS)
def test_floors_on_2000_fresh_questions(quantized, variant, tmp_path) -> None:
    import demo_data
    from lfm_quantize.calibrate.samples import read_questions

    demo_data.write_evaluation(tmp_path / "fresh", 2026, 500)
    fresh = read_questions(None, tmp_path / "fresh" / "fresh.jsonl")[0]
    assert len(fresh) == 2000
    check_floors(measure(quantized, variant, "fp32", fresh, 2), variant)


def test_what_the_bundle_holds(quantized, demo_bundle) -> None:
    """Every variant loads with all hashes checked and answers; fp32 is untouched; the manifest tells how each was made
    and how good it is.
    """
    manifest = read_manifest(quantized)
    assert list(manifest["variants"]) == ["fp32", "fp16", "int8", "int4"]
    before = tree(demo_bundle)
    told = ("manifest.json", "config.json")  # of all variants
    assert {n: h for n, h in tree(quantized).items() if n in before and n not in told} == {
        n: h for n, h in before.items() if n not in told
    }
    for variant in ("int8", "int4", "fp16"):
        model = Model.load(quantized, variant=variant, threads=1, verify=True)
        assert model.answer([ROOT / "demo/eval/images/0000.png"], "What is in this image?", temperature=0).text()
        quality, record = manifest["quality"][variant], manifest["quantization"][variant]
        assert quality["kl"] < 0.01
        assert len(quality["layers"]) == 12
        assert record["from"] == "fp32"
        assert record["calibration"]["images"] == 48
        for graph in manifest["variants"][variant].values():
            assert set(manifest["graphs"][graph]) >= {"inputs", "outputs", "opset", "min_onnxruntime", "data"}
            assert all((quantized / name).exists() for name in manifest["graphs"][graph]["data"])
    layers = {layer["name"]: layer for layer in manifest["quantization"]["int4"]["layers"]}
    assert layers["vision.encoder.layers.0.mlp.fc1"]["bits"] == 8
    assert layers["text.layers.0.conv.in_proj"]["bits"] == 4  # short convolutions take part
    # The table lies in one file, which the head reads as well.
    assert "onnx/embed_tokens_q4.onnx_data" in manifest["graphs"]["onnx/decoder_model_merged_q4.onnx"]["data"]


# ------------------------------------------------------------------------------------------------- outlier checkpoints


@pytest.fixture(scope="module")
def outliers(tmp_path_factory) -> Path:
    import make_outliers

    folder = tmp_path_factory.mktemp("outliers")
    assert make_outliers.add_outliers(CHECKPOINT, folder / "checkpoint", seed=0) > 100
    export(folder / "checkpoint", folder / "bundle")
    return folder / "bundle"


def test_outliers_change_no_answer(outliers, demo_model) -> None:
    image = ROOT / "demo/eval/images/0003.png"
    model = Model.load(outliers, threads=1)
    a, b = (m.encode([m.open(image)]) for m in (model, demo_model))
    np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(("variant", "kl"), [("int8", 0.005), ("int4", 0.02)])
def test_outliers_are_survived(outliers, few, questions, variant, kl) -> None:
    quantize(outliers, Settings(variant, (few / "images",), few / "calibration.jsonl"))
    quality = measure(outliers, variant, "fp32", questions[1][::8], 2)
    assert quality.cosine_min >= 0.99
    assert quality.kl <= kl


def test_per_tensor_ranges_do_not_survive_outliers(outliers, questions) -> None:
    """What onnxruntime's dynamic quantization does: one range for all tokens, no smoothing."""
    bundle = Bundle.open(outliers)
    exact = open_graph(bundle.graphs("fp32")[1]["vision_encoder"])
    rounded = {name: Product(rtn(linear.weights(), Precision(8), None)) for name, linear in linears(exact).items()}
    coarse = rewritten(exact, Integers(rounded))
    products = [n for n in coarse.graph if n.op_type == "MatMulIntegerToFloat"]
    assert len(products) > 10
    for n in products:
        scaled = n.outputs[0].uses()[0][0]  # the product of rows rounded each by its range is multiplied back
        x, weight, scales = n.inputs[0].producer().inputs[0], n.inputs[1], n.inputs[3]
        whole = node("DynamicQuantizeMatMul", [x, weight, scales], scaled.outputs[0].name, domain="com.microsoft")
        exchange(coarse.graph, scaled, [whole])
    views = [to_sample(bundle, q, split=False).views[0] for q in questions[1][:8]]
    a, b = session(exact, 1), session(coarse, 1)
    found = np.concatenate([cosines(a.run(None, v.feeds())[0], b.run(None, v.feeds())[0]) for v in views])
    assert found.min() < 0.99


# ------------------------------------------------------------------------------------------------------- killed, again


def test_a_killed_run_goes_on_where_it_was(demo_bundle, few, tmp_path, monkeypatch) -> None:
    settings = Settings("int4", (few / "images",), few / "calibration.jsonl", method="gptq")
    undisturbed = Path(shutil.copytree(demo_bundle, tmp_path / "undisturbed"))
    quantize(undisturbed, settings)
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    before = tree(bundle)
    blocks: list[str] = []
    real = integers.quantize_block
    monkeypatch.setattr(
        integers, "quantize_block", lambda fed, block, *rest: (blocks.append(block.name), real(fed, block, *rest))[1]
    )

    def kill(what: str, done: int, _: int) -> None:
        if what == "quantizes decoder_model_merged" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(bundle, settings, kill)
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


# ------------------------------------------------------------------------------------------------------------- gate


def test_below_the_floor(demo_bundle, few, tmp_path, capsys) -> None:
    """Exit 3, the reason and the layers to keep in one line, and the variant that was there still there."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    arguments = [
        "quantize",
        str(bundle),
        "--variant",
        "int4",
        "--calibration",
        str(few / "images"),
        "--prompts",
        str(few / "calibration.jsonl"),
        "--quiet",
    ]
    assert main([*arguments, "--method", "rtn"]) == 0
    before = tree(bundle)
    assert main([*arguments, "--method", "rtn", "--floor", "1e-9"]) == 3
    err = capsys.readouterr().err
    assert "int4 is not good enough: KL" in err
    assert not list(bundle.parent.glob(f".{bundle.name}*")), "the same command would come to the same: nothing is kept"
    assert "--keep '" in err
    assert err.count("\n") == 1
    assert tree(bundle) == before
    suggested = err.split("--keep '")[1].split("'")[0]
    assert main([*arguments, "--keep", suggested]) == 0
    kept = [
        layer["name"]
        for layer in read_manifest(bundle)["quantization"]["int4"]["layers"]
        if layer["name"].startswith(suggested.rstrip("*"))
    ]
    assert not kept


def test_memory_is_forecast_by_how_many_weights_share_a_scale(quantized, tmp_path, starts_empty) -> None:
    """Each scale of 4-bit weights takes some 15 bytes once they are packed, and 2 in the file."""
    bundle = Path(shutil.copytree(quantized, tmp_path / "bundle"))
    manifest = Manifest.of(bundle)

    def expected(block: int) -> float:
        recipe = [{"pattern": "*", "bits": 4, "block": block, "method": "rtn", "zero_points": False}]
        made = {**manifest.quantization, "int4": {**manifest.quantization["int4"], "recipe": recipe}}
        replace(manifest, quantization=made).write(bundle)
        found = resolve(bundle, "generic", variant="int4", prepared=False, force=True).forecast
        return found.memory.anonymous

    assert expected(32) > expected(64) > expected(128)


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


def test_a_judgement_over_more_questions_stays(quantized, tmp_path, capsys) -> None:
    bundle = Path(shutil.copytree(quantized, tmp_path / "bundle"))
    asked = [
        {"image": str(ROOT / f"demo/eval/images/000{n}.png"), "question": "What is in this image?"} for n in (0, 1)
    ]

    def judged(lines: list[dict[str, str]]) -> str:
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert main(["quality", str(bundle), "--variant", "int8", "--images", str(tmp_path / "q.jsonl")]) == 0
        return capsys.readouterr().err

    manifest = Manifest.of(bundle)
    replace(manifest, quality={}).write(bundle)
    assert "the numbers are kept in" in judged(asked[:1])
    assert "the numbers are kept in" in judged(asked)
    kept = Manifest.of(bundle).quality
    assert kept["int8"]["questions"] == 2
    assert "the numbers are not kept: manifest.json has those of 2 questions, these are of 1" in judged(asked[:1])
    assert Manifest.of(bundle).quality == kept


def test_same_against_itself_and_divergence(demo_bundle, questions) -> None:
    """A variant compared with itself differs in nothing; the divergence is torch's."""
    quality = measure(demo_bundle, "fp32", "fp32", questions[1][:6], 1)
    assert quality.kl < 1e-9
    assert quality.same_answers == 1
    assert quality.cosine_min > 0.999999
    assert all(layer.added < 1e-5 for layer in quality.layers)
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 100)).astype(np.float32) * 4
    wanted = torch.nn.functional.kl_div(
        torch.log_softmax(torch.tensor(b), 1), torch.log_softmax(torch.tensor(a), 1), log_target=True, reduction="none"
    ).sum(1)
    np.testing.assert_allclose(kl_divergence(a, b), wanted, rtol=1e-4)


def test_the_standard_error_is_that_of_other_questions() -> None:
    """Against the spread of means over answers drawn again, whole (bootstrap); tokens of an answer are alike."""
    rng = np.random.default_rng(0)
    answers = [rng.gamma(1, rng.gamma(2, 1), rng.integers(1, 30)).astype(np.float32) for _ in range(80)]
    means = [
        np.concatenate([answers[i] for i in rng.integers(0, len(answers), len(answers))]).mean() for _ in range(3000)
    ]
    assert standard_error(answers) == pytest.approx(np.std(means), rel=0.1)
    alone = [a[:1] for a in answers]
    assert standard_error(alone) == pytest.approx(np.std(np.concatenate(alone), ddof=1) / len(alone) ** 0.5, rel=1e-4)
    assert np.isnan(standard_error(answers[:1])), "one cannot tell"


def test_a_quick_run_beside_the_full_one(demo_bundle, few, tmp_path, capsys) -> None:
    """It uses fewer images and no GPTQ for 8 bits, is near the full one, and each prints the other's loss."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    words = ["quantize", str(bundle), "--variant", "int4", "--calibration", str(few / "images"), "--quiet"]
    words += ["--prompts", str(few / "calibration.jsonl")]
    assert main(words) == 0
    assert "run before" not in capsys.readouterr().out
    full = read_manifest(bundle)
    assert main([*words, "--quick", "--force"]) == 0
    said = capsys.readouterr().out
    quick = read_manifest(bundle)
    of = full["quality"]["int4"]
    assert f"full run before  KL {with_error(of['kl'], of['kl_error'])}" in said
    record = quick["quantization"]["int4"]
    assert record["quick"]
    assert record["calibration"]["images"] == 8 < full["quantization"]["int4"]["calibration"]["images"]
    methods = {(layer["bits"], layer["method"]) for layer in record["layers"]}
    assert methods == {(8, "rtn"), (4, "gptq-local"), (4, "clipped")}, "the table's scales are searched"
    assert quick["quality"]["int4"]["kl"] < 0.01
    assert main([*words, "--quick"]) == 0
    assert "full run before" in capsys.readouterr().out, "also after the second quick run"
    assert main(words) == 0
    of = quick["quality"]["int4"]
    assert f"quick run before KL {with_error(of['kl'], of['kl_error'])}" in capsys.readouterr().out


def test_judging_follows_the_runtime(quantized, questions) -> None:
    """Accuracy by the gate is accuracy by Model.answer."""
    asked = questions[1][:40]
    quality = measure(quantized, "int4", "fp32", asked, 1)
    model = Model.load(quantized, variant="int4", threads=1)
    right = [model.answer([q.image], q.text, temperature=0).text() == q.answer for q in asked]
    total = sum(found["int4"] * found["questions"] for found in quality.accuracy.values())
    assert total == pytest.approx(sum(right))


def refuse_for_want_of_room(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_quality_command(quantized, tmp_path, capsys, monkeypatch) -> None:
    bundle = Path(shutil.copytree(quantized, tmp_path / "bundle"))
    replace(Manifest.of(bundle), quality={}).write(bundle)  # by more questions than these
    lines = (ROOT / "demo/eval/eval.jsonl").read_text().splitlines()[:10]
    shutil.copytree(ROOT / "demo/eval/images", tmp_path / "images")
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    arguments = ["quality", str(bundle), "--variant", "int8", "--images", str(tmp_path / "q.jsonl"), "--quiet"]
    assert main([*arguments, "--layers", "--plot", str(tmp_path / "p.svg")]) == 0
    out = capsys.readouterr().out
    assert "image features" in out
    assert "text.layers.5" in out
    assert ET.parse(tmp_path / "p.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert b"vision.encoder.layers.3" in (tmp_path / "p.svg").read_bytes(), "as a comment beside its outlines"
    before = (tmp_path / "p.svg").read_bytes()
    with monkeypatch.context() as full:
        full.setattr("lfm_runtime.formats.files._write_whole", refuse_for_want_of_room)
        assert main([*arguments, "--plot", str(tmp_path / "p.svg")]) == 2
    assert "p.svg cannot be written (No space left on device); choose another place" in capsys.readouterr().err
    assert (tmp_path / "p.svg").read_bytes() == before
    assert main([*arguments, "--plot", str(tmp_path / "p.txt")]) == 2
    assert "name a .svg, .png or .pdf" in capsys.readouterr().err
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["questions"] == 10
    assert read_manifest(bundle)["quality"]["int8"]["kl"] == found["kl"]
    Bundle.open(bundle).verify()
    assert main(["quality", str(bundle), "--variant", "int3", "--images", str(tmp_path / "q.jsonl")]) == 2
    assert "there is no variant 'int3'" in capsys.readouterr().err
    assert main(["quality", str(bundle), "--variant", "int8", "--images", str(tmp_path / "nothing")]) == 2


# ---------------------------------------------------------------------------------------------------- search, static


@pytest.mark.slow
def test_search_within_a_size(demo_bundle, few, tmp_path, capsys) -> None:
    """The files are no larger than asked and not much smaller; the recipe found makes the same files again."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    arguments = [
        "quantize",
        str(bundle),
        "--variant",
        "int4",
        "--calibration",
        str(few / "images"),
        "--prompts",
        str(few / "calibration.jsonl"),
        "--quiet",
    ]
    assert main([*arguments, "--max-size", "3.9"]) == 0
    files = {n: h for n, h in tree(bundle).items() if "_q4" in n}
    size = sum((bundle / n).stat().st_size for n in files)
    assert 3.6e6 < size <= 3.9e6
    rules = read_manifest(bundle)["quantization"]["int4"]["recipe"]
    assert {rule["bits"] for rule in rules} == {4, 8}
    shutil.copy(bundle / "recipes" / "int4.toml", tmp_path / "r.toml")
    assert main([*arguments, "--recipe", str(tmp_path / "r.toml")]) == 0
    assert {n: h for n, h in tree(bundle).items() if "_q4" in n} == files
    assert main([*arguments, "--max-size", "1"]) == 2
    assert "--max-size cannot be met" in capsys.readouterr().err


def test_static_int8(demo_bundle, few, questions, tmp_path) -> None:
    """QDQ nodes around every product, ranges in the graph, no If; good enough on pictures it did not see."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    quantize(bundle, Settings("int8-static", (few / "images",), few / "calibration.jsonl"))
    graph = onnx.load(bundle / "onnx" / "vision_encoder_int8_static.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") >= 19
    assert "If" not in kinds
    quality = measure(bundle, "int8-static", "fp32", questions[1][::12], 1)
    assert quality.cosine_mean > 0.998
    assert read_manifest(bundle)["variants"]["int8-static"]["decoder_model_merged"] == "onnx/decoder_model_merged.onnx"
    assert Model.load(bundle, variant="int8-static", threads=1).answer([], "hi").text() is not None


# -------------------------------------------------------------------------------------------------------- no images


def test_without_calibration(demo_bundle, tmp_path, capsys) -> None:
    """Said plainly, and nothing is claimed about quality."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    assert main(["quantize", str(bundle), "--variant", "int4", "--quiet"]) == 0
    assert "rounded without calibration" in capsys.readouterr().err
    manifest = read_manifest(bundle)
    assert manifest["quantization"]["int4"]["calibration"] == {"images": 0, "questions": 0, "skipped": 0}
    assert "int4" not in manifest.get("quality", {})
    assert Model.load(bundle, variant="int4", threads=1).answer([], "hi").text() is not None


@pytest.mark.slow  # blind, and for GPUs: test_gpu_variants.py
def test_starting_from_fp16(few, tmp_path) -> None:
    export(CHECKPOINT, tmp_path / "bundle", dtype="fp16")
    quality = quantize(tmp_path / "bundle", Settings("int8", (few / "images",), few / "calibration.jsonl"))
    assert quality.against == "fp16"
    assert quality.cosine_min > 0.998
    with pytest.raises(QuantizeError, match="nothing finer to make it from"):
        quantize(tmp_path / "bundle", Settings("fp16"))


# -------------------------------------------------------------------------------------------------------- bad input


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
    "no fp32": (remove_fp32, "neither fp32 nor fp16 weights to start from"),
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


def test_gate_error_is_an_edge_error() -> None:
    assert GateError.exit_code == 3
    assert issubclass(GateError, ValueError)


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
    assert read_manifest(bundle)["quantization"]["fp16"]["calibration"] == {"images": 3, "questions": 3, "skipped": 1}


QUANTIZE = """
import sys
from pathlib import Path
from lfm_quantize.quantize import quantize
from lfm_quantize.settings import Settings
quantize(Path(sys.argv[1]), Settings("int4", (Path(sys.argv[2]),), method="gptq", floor=1000.0))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "limit_mib"), [("450m", 2048), ("1.6b", 5120)])
def test_memory_at_full_size(full_size, peak_mib, tmp_path, size, limit_mib) -> None:
    """Of int4 with calibration on random full-size weights. A quarter of an hour, and an hour; 5 and 17 GB of disk."""
    export(full_size(size), tmp_path / "bundle")
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.open(ROOT / "demo/photos/coffee.jpg").crop((0, 0, 400 + 16 * i, 380)).save(
            tmp_path / "images" / f"{i}.jpg"
        )
    assert peak_mib(QUANTIZE, tmp_path / "bundle", tmp_path / "images") <= limit_mib


def test_quality_as_a_profile_runs_it(quantized, tmp_path, capsys) -> None:
    """pi5 shows the model one view where the checkpoint would see tiles: that costs more than int8 does, and is told."""
    bundle = quantized
    photo = ROOT / "demo" / "photos" / "coffee.jpg"
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": str(photo), "question": "What is in this image?"}))
    words = ["quality", str(bundle), "--images", str(tmp_path / "q.jsonl"), "--quiet", "--json"]

    def found(*more: str) -> dict:
        assert main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out)

    before = (bundle / "manifest.json").read_bytes()
    board = found("--profile", "pi5", "--variant", "int8")
    assert (bundle / "manifest.json").read_bytes() == before, "figures of a board are not the variant's own"
    plain = found("--variant", "int8")
    assert plain["board"] is None
    assert board["board"]["profile"] == "pi5"
    assert board["board"]["changes"] == ["do_image_splitting off instead of on"]
    assert board["board"]["image_tokens"] < board["board"]["other_image_tokens"] / 4
    assert board["cosine_min"] is None
    assert board["kl"] > 10 * plain["kl"]
    few = found("--variant", "int8", "--max-image-tokens", "32", "--no-do-image-splitting")
    assert few["board"]["image_tokens"] <= 32
    same = found("--variant", "int8", "--profile", "generic")
    assert same["kl"] == pytest.approx(plain["kl"], rel=1e-3), "a profile that changes nothing"
    assert main([*words, "--profile", "pi5", "--layers"]) == 2
    assert main(words) == 2
    assert "--variant is needed, or --profile" in capsys.readouterr().err


def test_a_board_for_both_variants_measures_the_variant_alone(quantized, tmp_path) -> None:
    """One view instead of tiles for both: the features are comparable, and the loss is about the variant's own."""
    from lfm_quantize.judge.measure import Board
    from lfm_runtime.setup.profile import find_profile

    photo = ROOT / "demo" / "photos" / "coffee.jpg"
    asked = [Question(photo, "What is in this image?"), Question(photo, "Describe the image.")]
    bundle = Bundle.open(quantized)
    profile = find_profile("pi5", variant="int4")
    one, alike = (
        measure(quantized, "int4", "fp32", asked, 1, board=Board.of(bundle, profile, alike=a)) for a in (False, True)
    )
    assert one.board is not None
    assert alike.board is not None
    assert alike.board["prefill"] == "int8"
    assert alike.board["image_tokens"] == alike.board["other_image_tokens"] == one.board["image_tokens"]
    assert alike.kl < one.kl / 10
    assert alike.cosine_min > 0.9
    assert alike.layers
    assert "a question, for both" in alike.table()


def test_judging_as_a_profile_follows_the_runtime(quantized, questions) -> None:
    """Accuracy with a board's image settings and prefill decoder is accuracy by a Model of that profile."""
    from lfm_quantize.judge.measure import Board

    asked = questions[1][:60]
    model = Model.load(quantized, variant="int4", prefill="int8", max_image_tokens=16, min_image_tokens=4, threads=1)
    board = Board("pi5", "int8", model.setup.images, ())
    quality = measure(quantized, "int4", "fp32", asked, 1, board=board)
    right = [model.answer(q.image, q.text, temperature=0).text() == q.answer for q in asked]
    total = sum(found["int4"] * found["questions"] for found in quality.accuracy.values())
    assert total == pytest.approx(sum(right))
    assert 0 < sum(right) < len(right), "so few tokens cost some answers"


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


def quality_of(kl: float, error: float, questions: int = 4) -> Any:
    from lfm_quantize.judge.quality import Quality

    cosines = (1.0, 1.0, 1.0)
    return Quality("int4", "fp32", questions, questions, 9, *cosines, kl, error, 1.0, 1.0, {}, 1, 2, 4.0, [], 1.0)


@pytest.mark.parametrize(
    ("kl", "error", "questions", "said"),
    [
        (0.01, 0.001, 9, "is good enough: KL 0.01, at most 0.1 is allowed"),
        (0.12, 0.03, 4, "may be good enough, 4 questions do not tell"),
        (0.09, 0.03, 4, "may be good enough, 4 questions do not tell"),
        (0.002, float("nan"), 1, "may be good enough, one question does not tell"),
        (0.15, 0.01, 9, None),
        (0.21, 0.3, 4, None),
        (0.2, float("nan"), 1, None),
    ],
)
def test_the_floor_heeds_the_error(kl, error, questions, said) -> None:
    """What is within the standard error of the floor is neither refused nor called good."""
    from lfm_quantize.judge.quality import check_floor

    quality = quality_of(kl, error, questions)
    if said is None:
        with pytest.raises(GateError, match="is not good enough"):
            check_floor(quality, 0.1)
    else:
        assert said in check_floor(quality, 0.1)
