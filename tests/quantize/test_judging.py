"""What a variant lost: figures against torch and the runtime, as a device runs it, the floor, `lfm-edge quality`."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import int4_words, read_manifest, tree
from lfm_quantize.judge.distances import kl_divergence, standard_error
from lfm_quantize.judge.measure import measure
from lfm_quantize.judge.quality import GateError
from lfm_quantize.variant import calibration_marks
from lfm_runtime import Model
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.formats.manifest import Manifest
from lfm_runtime.questions import Question

ROOT = Path(__file__).resolve().parents[2]


def test_below_the_floor(demo_bundle, few, tmp_path, capsys) -> None:
    """Exit 3, the reason and the layers to keep in one line, and the variant that was there still there."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    arguments = int4_words(bundle, few)
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


def test_numbers_of_a_variant_made_anew_meanwhile_are_not_kept(quantized, few, tmp_path, monkeypatch, capsys) -> None:
    from lfm_quantize.judge import measure as measuring

    bundle = Path(shutil.copytree(quantized, tmp_path / "bundle"))
    real = measuring.measure

    def slowly(*given, **more):
        found = real(*given, **more)
        assert main(["quantize", str(bundle), "--variant", "int4", "--force", "--quiet"]) == 0
        return found

    monkeypatch.setattr(measuring, "measure", slowly)
    words = ["--variant", "int4", "--images", str(few / "images"), "--prompts"]
    (tmp_path / "q.txt").write_text("What is it?\n")
    assert main(["quality", str(bundle), *words, str(tmp_path / "q.txt")]) == 0
    assert "int4 was made anew meanwhile, and they are of the one before" in capsys.readouterr().err
    assert "int4" not in read_manifest(bundle)["quality"]


def test_only_the_loss_to_floats_is_kept(quantized, tmp_path, capsys) -> None:
    """int8 and int4 are near each other: a report would show their distance as int4's loss. What was packed stays as it
    is, byte by byte.
    """
    bundle = Path(shutil.copytree(quantized, tmp_path / "bundle"))
    line = (ROOT / "demo/eval/eval.jsonl").read_text().splitlines()[0]
    (tmp_path / "q.jsonl").write_text(line)
    shutil.copytree(ROOT / "demo/eval/images", tmp_path / "images")

    def judged(folder: Path, *words: str) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["quality", str(folder), "--variant", "int4", "--images", str(tmp_path / "q.jsonl"), *words]) == 0
        return capsys.readouterr()

    marks = calibration_marks([tmp_path / json.loads(line)["image"]])
    whole, of = Manifest.of(bundle), dict(Manifest.of(bundle).quantization["int4"])
    assert len(of["calibration"]["sha256"]) == of["calibration"]["images"]
    of["calibration"] = {**of["calibration"], "sha256": [*of["calibration"]["sha256"], *marks]}
    replace(whole, quantization={**whole.quantization, "int4": of}, quality={}).write(bundle)
    assert (
        "1 of 1 image calibrated int4, so that its loss on others is larger; the numbers are not" in judged(bundle).err
    )
    seen = judged(bundle, "--profile", "pi5").err
    assert seen.endswith("1 of 1 image calibrated int4, so that its loss on others is larger\n")
    other = dict(whole.quantization["int8"], calibration={"images": 1, "sha256": marks})
    replace(whole, quantization={**whole.quantization, "int8": other}, quality={}).write(bundle)
    assert "1 of 1 image calibrated int8" in judged(bundle, "--profile", "pi4").err, "whose decoder reads the prompts"
    whole.write(bundle)
    before = tree(bundle)
    assert "has the loss to fp32 or fp16, these are to int8" in judged(bundle, "--against", "int8").err
    itself = judged(bundle, "--against", "int4")
    assert "these are to the variant itself" in itself.err
    assert "smaller losses are not told apart" in itself.out
    assert "manifest.json has those against fp32, these are against fp16" in judged(bundle, "--against", "fp16").err
    assert tree(bundle) == before

    packed, there = tmp_path / "small.tar", tmp_path / "small"
    assert main(["pack", str(bundle), "--variant", "int4", "--prefill", "int8", "-o", str(packed)]) == 0
    assert main(["unpack", str(packed), "-o", str(there)]) == 0
    before = tree(there)
    said = judged(there, "--against", "int8", "--json").out
    assert json.loads(said)["bits_per_weight"] is None, "no floats, in which weights are counted"
    assert "bits a weight" not in judged(there, "--against", "int8").out
    assert tree(there) == before

    assert main(["pack", str(bundle), "--variant", "int4", "--prefill", "fp32", "-o", str(packed), "--force"]) == 0
    shutil.rmtree(there)
    assert main(["unpack", str(packed), "-o", str(there)]) == 0
    before = tree(there)
    assert "small was packed, and its SHA256SUMS names manifest.json; judge before packing" in judged(there).err
    assert tree(there) == before
    assert main(["quantize", str(there), "--variant", "int8", "--quiet"]) == 0
    assert "SHA256SUMS will not be true of it any more and goes: pack it again" in capsys.readouterr().err
    assert main(["verify", str(there)]) == 0


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
    (tmp_path / "mine.svg").write_text("mine")
    assert main([*arguments, "--plot", str(tmp_path / "mine.svg")]) == 2
    assert "choose another name, or remove it first" in capsys.readouterr().err
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


def test_gate_error_is_an_edge_error() -> None:
    assert GateError.exit_code == 3
    assert issubclass(GateError, ValueError)


def test_what_a_profile_would_also_use_is_told(demo_bundle, tmp_path, capsys) -> None:
    """As `stick` and `pack` say: the board may run other variants than were judged."""
    photo = ROOT / "demo" / "photos" / "coffee.jpg"
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": str(photo), "question": "What is in this image?"}))
    assert main(["quality", str(demo_bundle), "--images", str(tmp_path / "q.jsonl"), "--profile", "pi4"]) == 0
    said = capsys.readouterr().err
    assert f"profile pi4 would also use int8, which the bundle lacks: lfm-edge quantize {demo_bundle} --var" in said


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
    profile = find_profile("pi4", variant="int4")
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
    board = Board("pi4", "int8", model.setup.images, ())
    quality = measure(quantized, "int4", "fp32", asked, 1, board=board)
    right = [model.answer(q.image, q.text, temperature=0).text() == q.answer for q in asked]
    total = sum(found["int4"] * found["questions"] for found in quality.accuracy.values())
    assert total == pytest.approx(sum(right))
    assert 0 < sum(right) < len(right), "so few tokens cost some answers"


def test_points_lost_have_no_negative_zero() -> None:
    from lfm_quantize.judge.quality import _points

    assert [_points(lost) for lost in (-0.0, 0.0, -0.004, 0.005, -1.0)] == [
        "lost 0 points",
        "lost 0 points",
        "lost 0 points",
        "lost 0.01 points",
        "gained 1.00 points",
    ]


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
        rule = "twice 0.1" if kl - error <= 0.1 else "0.1" if np.isnan(error) else "0.1 by more than its standard error"
        with pytest.raises(GateError, match=f"is not good enough: KL .* is above {rule}"):
            check_floor(quality, 0.1)
    else:
        assert said in check_floor(quality, 0.1)


def test_what_to_keep_names_what_was_kept_as_well() -> None:
    """Taken word for word, the advice does not go in a circle."""
    from lfm_quantize.judge.quality import LayerError, check_floor

    quality = quality_of(0.5, 0.01, 9)
    quality.layers = [LayerError(f"text.layers.{n}", 0.1, 0.1, n / 10) for n in range(5)]
    with pytest.raises(GateError) as refused:
        check_floor(quality, 0.1, kept=("text.layers.0.*", "text.layers.4.*"))
    said = re.findall(r"--keep '([^']+)'", str(refused.value))
    assert said == ["text.layers.0.*", "text.layers.4.*", "text.layers.3.*", "text.layers.2.*", "text.layers.1.*"]
    with pytest.raises(GateError, match="Try more calibration images"):
        check_floor(quality, 0.1, kept=("text.*",))
