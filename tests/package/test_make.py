"""From a checkpoint to a stick: the steps, what is done again and what is not, and what is refused before the work."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lfm_package import make as module
from lfm_package.commands.make import _order
from lfm_package.estimate import Sizes, cost, table
from lfm_package.make import Done, Order, Step, steps_of
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.commands.parser import Parser
from lfm_runtime.formats.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "demo" / "checkpoint"
PYTHON = f"3.{sys.version_info.minor}"


@pytest.fixture
def few(tmp_path) -> Path:
    """Ten calibration images, in a folder with a space."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for image in sorted((ROOT / "demo" / "calibration" / "images").iterdir())[:10]:
        shutil.copy(image, folder)
    return folder


def asked(*words: str) -> Order:
    from lfm_package.commands import make

    parser = Parser(prog="lfm-edge make")
    make.add_arguments(parser)
    return _order(parser.parse_intermixed_args(list(words)))


@pytest.mark.process
def test_from_checkpoint_to_stick_and_again(few, tmp_path, capfd, monkeypatch) -> None:
    """A second run makes only the stick; with another image the variants, but no export. What they would run is seen."""
    words = ["make", str(CHECKPOINT), "--target", "x86_64", "--python", PYTHON, "--calibration", str(few), "--quick"]
    words += ["--profile", "pi4", "-o", str(tmp_path / "cam")]
    assert main(words) == 0
    said = capfd.readouterr().err
    assert "10 images: three quarters calibrate, a quarter judges (quick: at most 8 and 4)" in said
    assert (
        f"cost together, with other images better: lfm-edge quality {tmp_path / 'cam-bundle'} --profile pi4 --images '{few}'"
        in said
    )
    told = [said.index(f"of 4, {step}: lfm-edge") for step in ("export", "int8", "int4", "stick")]
    assert told == sorted(told), "the prefill decoder is there when the other variant is judged"
    assert "in all" in said
    bundle = Bundle.open(tmp_path / "cam-bundle")
    assert set(bundle.variants) == {"fp32", "int8", "int4"}
    assert bundle.manifest is not None
    judged = bundle.manifest.quality["int4"]["board"]
    assert (judged["profile"], judged["prefill"], judged["alike"]) == ("pi4", "int8", True)
    assert judged["changes"][0] == "do_image_splitting off instead of on"
    conf = dict(line.split("=", 1) for line in (tmp_path / "cam" / "stick.conf").read_text().splitlines())
    assert (conf["variant"], conf["prefill"]) == ("int4", "int8")

    again: list[str] = []
    monkeypatch.setattr(Step, "run", lambda step: again.append(step.name) or 0)
    assert main(words) == 0
    assert again == ["stick"]
    said = capfd.readouterr().err
    assert all(f"{step}: done before" in said for step in ("export", "int4", "int8"))
    assert "all but the stick was done before" in said

    shutil.copy(ROOT / "demo" / "photos" / "rocket.jpg", few)
    again.clear()
    assert main(words) == 0
    assert again == ["int8", "int4", "stick"]
    said = capfd.readouterr().err
    assert "export: done before" in said
    assert all(f"{step}: lfm-edge quantize" in said for step in ("int4", "int8"))


@pytest.mark.process
def test_a_step_that_fails_ends_with_its_code(tmp_path, capfd) -> None:
    """Export tells why; nothing after it is done; and what is done is not forgotten."""
    checkpoint = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
    (checkpoint / "tokenizer.json").write_text("{")
    words = ["make", str(checkpoint), "--target", "pi5", "-o", str(tmp_path / "cam")]
    assert main(words) == 2
    said = capfd.readouterr().err
    assert "tokenizer.json" in said
    assert "make stopped at export; once that is mended, the same command goes on from there" in said
    assert not (tmp_path / "cam").exists()
    assert not (tmp_path / "cam-bundle").exists()


def test_a_variant_that_is_not_good_enough_is_not_tried_again(tmp_path, monkeypatch, capsys) -> None:
    """The floor is quantize's; what helps is told."""
    monkeypatch.setattr(Step, "run", lambda step: 3 if step.name == "int4" else 0)
    output = tmp_path / "my cam"
    assert main(["make", str(CHECKPOINT), "--target", "pi5", "-o", str(output)]) == 3
    said = capsys.readouterr().err
    assert f"go on with: lfm-edge stick '{output}-bundle' -o '{output}' --target pi5" in said
    words = ["--quick", "--calibration", str(ROOT / "demo" / "photos")]
    assert main(["make", str(CHECKPOINT), "--target", "pi5", "-o", str(output), *words]) == 3
    assert "the same command without --quick goes on from there" in capsys.readouterr().err


def test_ctrl_c_says_how_it_goes_on(tmp_path, monkeypatch, capsys) -> None:
    def interrupted(_: Step) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Step, "run", interrupted)
    assert main(["make", str(CHECKPOINT), "--target", "pi5", "-o", str(tmp_path / "cam")]) == 130
    assert "interrupted; the same command goes on after the last finished step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--target", "pi9"], "unknown target 'pi9'"),
        (["--target", "pi5", "--python", "3.9"], "pi5 has no Python 3.9"),
        (["--target", "pi5", "--profile", "jetson-orin-cuda"], "runs on a GPU"),
        (["--target", "pi5", "--sign", "nokey"], "nokey"),
        (["--target", "pi5", "--calibration", "nowhere"], "nowhere does not exist"),
        (["--target", "pi5", "--calibration", str(CHECKPOINT)], "has no images"),
        (["--target", "pi5", "--adapter", "no-lora"], "no-lora does not exist"),
        (["--target", "pi5", "--prompts", "none.jsonl"], "none.jsonl does not exist"),
        (["--target", "pi5", "--quick"], "--quick has no effect without --calibration"),
        (["--target", "pi5", "--bundle", "cam"], "cam is named twice"),
        (["--target", "pi5", "--golden", "none.jsonl"], "none.jsonl does not exist"),
    ],
)
def test_what_a_later_step_would_refuse_is_refused_first(words, told, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["make", str(CHECKPOINT), *words, "-o", "cam"]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_golden_questions_are_read_before_the_work(tmp_path, capsys) -> None:
    (tmp_path / "g.jsonl").write_text('{"image": "a.png"}\n')
    words = ["--target", "pi5", "--golden", str(tmp_path / "g.jsonl"), "-o", str(tmp_path / "cam")]
    assert main(["make", str(CHECKPOINT), *words]) == 2
    assert 'g.jsonl, line 1: no JSON object with "image" and "question"' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["g.jsonl"]


def test_a_checkpoint_that_is_none(tmp_path, capsys) -> None:
    assert main(["make", str(tmp_path), "--target", "pi5", "-o", str(tmp_path / "cam")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is no checkpoint, it has no config.json" in line
    assert main(["make", str(tmp_path / "chekpoint"), "--target", "pi5", "-o", str(tmp_path / "cam")]) == 2
    assert "chekpoint does not exist; name" in capsys.readouterr().err


def test_a_file_in_the_way_is_seen_before_the_work(tmp_path, capsys) -> None:
    (tmp_path / "cam.tar").write_text("mine")
    assert main(["make", str(CHECKPOINT), "--target", "pi5", "-o", str(tmp_path / "cam.tar")]) == 2
    assert "cam.tar" in capsys.readouterr().err
    assert (tmp_path / "cam.tar").read_text() == "mine"
    (tmp_path / "cam").mkdir()
    (tmp_path / "cam" / "notes.txt").write_text("mine")
    for place in ("cam", "cam/notes.txt"):
        assert main(["make", str(CHECKPOINT), "--target", "pi5", "-o", str(tmp_path / place)]) == 2
        assert "not something lfm-edge stick made; choose another output" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cam", "cam.tar", "notes.txt"]
    words = ["--bundle", str(tmp_path / "bundle"), "-o", str(tmp_path / "cam.tar" / "stick")]
    assert main(["make", str(CHECKPOINT), "--target", "pi5", *words]) == 2
    assert "stick cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("target", "variants"), [("pi4", ["int8", "int4"]), ("pi5", None), ("jetson-jp6", None), ("x86_64", None)]
)
def test_variants_are_what_the_profile_would_miss(target, variants, demo_bundle, tmp_path) -> None:
    """As `doctor` says it of a bundle with fp32 alone."""
    from lfm_runtime.setup.variants import unmet

    order = asked(str(CHECKPOINT), "--target", target, "-o", str(tmp_path / "cam"))
    fp32 = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    assert list(Bundle.open(fp32).variants) == ["fp32"]
    assert set(order.variants()) == set(unmet(Bundle.open(fp32), order.board))
    assert variants is None or order.variants() == variants


@pytest.mark.parametrize(("variant", "missed"), [("fp32", []), ("", ["int8"])])
def test_a_prefill_decoder_that_would_not_be_used_is_not_missed(variant, missed, demo_bundle, tmp_path) -> None:
    """Who names float weights means them for the prompt as well."""
    from lfm_runtime.setup.profile import find_profile
    from lfm_runtime.setup.variants import unmet

    profile = find_profile("x86-avx2", **({"variant": variant} if variant else {}))
    assert [name for name in unmet(Bundle.open(demo_bundle), profile) if name != "int4"] == missed


def test_done_holds_only_for_the_same_inputs_and_what_is_there(demo_bundle, tmp_path) -> None:
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    order = Order(CHECKPOINT, bundle, tmp_path / "cam", "pi5")
    export, int4, *_, stick = steps_of(order)
    done = Done(bundle)
    assert not done.has(export)
    done.add(export)
    done.add(int4)
    again = Done(bundle)
    assert again.has(export)
    assert not again.has(int4), "the bundle lacks it"
    assert not again.has(stick)
    other = steps_of(Order(CHECKPOINT, bundle, tmp_path / "cam", "pi5", adapter=tmp_path))[0]
    assert not again.has(other)
    small = Order(CHECKPOINT, bundle, tmp_path / "cam", "pi5", quick=True)
    done.add(replace(int4, name="fp32"))  # the bundle has that one
    assert done.has(replace(steps_of(small)[1], name="fp32")), "a full one does for a quick one"
    done.add(replace(steps_of(small)[1], name="fp32"))
    assert not done.has(replace(int4, name="fp32"))
    shutil.rmtree(bundle)
    assert not done.has(export), "what was made is gone"
    shutil.copytree(demo_bundle, bundle)
    for text in ("", "[]", '{"export": 1}', json.dumps({"export": {"made_of": [export.made_of]}})):
        again.path.write_text(text)
        assert not Done(bundle).has(export)
        assert ("all is done again" in Done(bundle).damage) == (text in ("", "[]"))


def test_done_is_only_what_make_has_made_itself(demo_bundle, tmp_path) -> None:
    """An experiment in the bundle, or another one in its place, is not what was asked for and judged."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    export, int4, *_ = steps_of(Order(CHECKPOINT, bundle, tmp_path / "cam", "pi5"))
    steps, done = [export, replace(int4, name="fp32")], Done(bundle)  # a variant that the bundle has
    for step in steps:
        done.add(step)
    assert all(Done(bundle).has(step) for step in steps)
    whole = Manifest.of(bundle)
    replace(whole, quality={"fp32": {"kl": 0.1}}).write(bundle)
    assert all(Done(bundle).has(step) for step in steps), "another judgement changes nothing"
    replace(whole, quantization={"fp32": {"quick": True}}).write(bundle)
    assert [Done(bundle).has(step) for step in steps] == [True, False]
    whole.write(bundle)
    assert all(Done(bundle).has(step) for step in steps)
    weights = "onnx/decoder_model_merged.onnx_data"
    replace(whole, files={**whole.files, weights: replace(whole.files[weights], sha256="0" * 64)}).write(bundle)
    assert not any(Done(bundle).has(step) for step in steps)


def test_an_interrupted_step_is_not_done(tmp_path, monkeypatch) -> None:
    """Ctrl-C reaches the step too, which is waited for."""
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(7)); print(flush=True); time.sleep(60)"
    monkeypatch.setattr(module, "module", lambda _, *words: [sys.executable, "-c", code])
    waited = []

    class Popen(module.subprocess.Popen):
        def wait(self, timeout=None):
            if not waited:
                waited.append(self)
                self.stdout.readline()  # it is ready to be ended
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: Popen(*a, **k, stdout=module.subprocess.PIPE))
    with pytest.raises(KeyboardInterrupt):
        Step("export", [], "x").run()
    assert waited[0].returncode == 7


def test_sizes_and_costs_of_a_checkpoint() -> None:
    """The weights that config.json comes to are those in the file; more of anything costs more."""
    sizes = Sizes.of(CHECKPOINT)
    stored = sum(file.stat().st_size for file in CHECKPOINT.glob("*.safetensors"))
    assert sizes.all * 1e9 == pytest.approx(stored / 2, rel=0.01)
    order = Order(CHECKPOINT, Path("b"), Path("s"), "pi5", calibration=(Path(),))
    quick = Order(CHECKPOINT, Path("b"), Path("s"), "pi5", calibration=(Path(),), quick=True)
    int4 = Step("int4", [], "x")
    assert cost(int4, sizes, quick, 40, 100).seconds < cost(int4, sizes, order, 40, 100).seconds
    assert cost(int4, sizes, order, 40, 100).seconds < cost(int4, sizes, order, 80, 100).seconds
    assert cost(int4, sizes, order, 40, 50).seconds == pytest.approx(2 * cost(int4, sizes, order, 40, 100).seconds)


def test_shown_figures_add_up() -> None:
    """In seconds, and in minutes."""
    order = Order(CHECKPOINT, Path("b"), Path("s"), "pi5")
    steps = [step for step in steps_of(order) if step.made_of]
    shown = [line.split() for line in table(order, steps).splitlines() if line.endswith("GB")]
    seconds = [int(line[-6]) * (60 if line[-5] == "min" else 1) for line in shown]
    assert sum(seconds[:-1]) == seconds[-1]


def test_force_reaches_every_step_that_asks_for_it(few, tmp_path) -> None:
    """Whose messages name it."""
    words = [str(CHECKPOINT), "--target", "pi4", "--calibration", str(few), "-o", str(tmp_path / "cam")]
    for given in ([], ["--force"]):
        steps = {step.name: step for step in steps_of(asked(*words, *given))}
        assert [("--force" in steps[name].words) for name in ("int8", "int4", "stick")] == [bool(given)] * 3
        assert "--force" not in steps["export"].words
