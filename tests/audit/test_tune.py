"""The search against devices whose costs are known; then, shortly, the real one."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from lfm_audit.measure.trial import AnswerTimes, Outcome, Trial, TrialError, start
from lfm_audit.tune import search as tuning_module
from lfm_audit.tune.search import axes_of, tune
from lfm_audit.tune.tuning import Measured, Tuning
from lfm_profiles import Device, read, with_flags
from lfm_profiles.sensors import Sensors
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import SettingError
from lfm_runtime.formats.files import is_sealed, sealed

pytestmark = pytest.mark.newest_python

QUESTION = "What is in this image?"
BIG = Device("Linux", "x86_64", 64, 4096, ram_total_mib=16000, ram_available_mib=16000)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    from PIL import Image

    path = tmp_path / "photo.png"
    Image.effect_noise((600, 400), 60).convert("RGB").save(path)
    return path


class Scripted:
    """A device whose costs are a formula, with noise: trials ask this instead of a process."""

    def __init__(self, cost, noise: float = 0.03) -> None:
        self.cost, self.random, self.noise, self.asked = cost, random.Random(1), noise, 0
        self.interrupt_at: int | None = None

    def __call__(self, trial: Trial, *, watch=None, environment=None) -> Outcome:
        if trial.repeats == 0:
            return outcome(1.0, 1.0, 0.0)
        self.asked += 1
        if self.asked == self.interrupt_at:
            raise KeyboardInterrupt
        ms, mib, kl = self.cost(trial.profile)
        return outcome(ms * math.exp(self.random.gauss(0, self.noise)), mib, kl)


def outcome(ms: float, mib: float, kl: float) -> Outcome:
    answers = [
        AnswerTimes(0, repeat, [("written", ms * 0.8, ms * 0.8)], 0.0, ms, 10, 5, 32, 1, "") for repeat in (0, 1)
    ]
    memory = {"peak": mib, "rss": mib, "rss_anon": mib / 2}
    return Outcome(0.0, "int4", None, 1, False, 1, 1, 1, {}, 1, answers, memory, memory, 0.1, kl)


def search(
    bundle_folder: Path,
    photo: Path,
    monkeypatch,
    cost,
    *,
    objective="latency",
    floor=0.1,
    minutes=0.2,
    flags=None,
    noise=0.03,
):
    bundle = Bundle.open(bundle_folder)
    profile = with_flags(read("generic"), flags or {})
    axes = axes_of(bundle, profile, [photo])
    axes["variant"], axes["prefill"], axes["threads"] = ["fp32", "int8", "int4"], ["none", "int8"], [1, 2, 4]
    monkeypatch.setattr(tuning_module, "fits_as_it_is", lambda *_: None)
    monkeypatch.setattr(tuning_module, "_make_reference", lambda *_: "fp32")
    monkeypatch.setattr(tuning_module, "start", scripted := Scripted(cost, noise))
    found = Tuning(bundle, profile, [photo], QUESTION, objective, floor, axes)
    tune(found, BIG, minutes=minutes, kept=photo.with_suffix(".json"), sensors=Sensors(photo.parent))
    return found, scripted


def cost(profile) -> tuple[float, float, float]:
    """Best in latency within the floor: int4 read by int8, 2 threads, 4 tiles; least memory: int4, low_memory, no
    tiles.
    """
    variant = profile.variant[0]
    ms = {"fp32": 900.0, "int8": 500.0, "int4": 450.0}[variant] * {1: 1.7, 2: 1.0, 4: 1.3}[profile.threads]
    tiles = profile.max_tiles if profile.do_image_splitting else 1
    ms += 60 * tiles
    mib = {"fp32": 1400.0, "int8": 450.0, "int4": 300.0}[variant]
    if profile.prefill == "int8":
        ms, mib = ms - 120, mib + 300
    if profile.low_memory:
        ms, mib = ms + 400, mib * 0.6
    kl = {"fp32": 0.0, "int8": 0.01, "int4": 0.03}[variant] + {1: 0.3, 4: 0.05}.get(tiles, 0.0)
    return ms, mib, kl


def test_finds_the_fastest_that_is_good_enough(demo_bundle, photo, monkeypatch) -> None:
    found, _ = search(demo_bundle, photo, monkeypatch, cost)
    best = dict(found.chosen())
    assert (best["variant"], best["prefill"], best["threads"], best["tiles"], best["low_memory"]) == (
        "int4",
        "int8",
        2,
        4,
        False,
    )
    assert found.good_enough(found.chosen())
    assert len(found.points[found.chosen()].latency_ms) >= 8
    slower = tuple(sorted({**best, "threads": 1}.items()))
    assert slower in found.points, "it was looked at"
    assert slower not in found.front(), "1.7 times slower, the same in all else"


@pytest.mark.slow
def test_finds_the_smallest(demo_bundle, photo, monkeypatch) -> None:
    found, _ = search(demo_bundle, photo, monkeypatch, cost, objective="memory")
    best = dict(found.chosen())
    assert (best["variant"], best["low_memory"], best["prefill"]) == ("int4", True, "none")
    unbounded, _ = search(demo_bundle, photo.with_name("photo.png"), monkeypatch, cost, floor=10.0)
    assert dict(unbounded.chosen())["tiles"] == 1


def test_keeps_the_profile_where_chance_decides(demo_bundle, photo, monkeypatch) -> None:
    """All settings cost the same: whatever looked best by chance, nothing of the profile is changed."""
    found, _ = search(demo_bundle, photo, monkeypatch, lambda _: (500.0, 300.0, 0.0))
    assert found.chosen() == found.first_point()


def test_flags_stand(demo_bundle, photo, monkeypatch) -> None:
    bundle = Bundle.open(demo_bundle)
    axes = axes_of(bundle, with_flags(read("generic"), {"threads": 1, "max_tiles": 3, "arena": False}), [photo])
    assert (axes["threads"], axes["tiles"], axes["arena"]) == ([1], [3], [False])
    assert axes_of(bundle, with_flags(read("generic"), {"do_image_splitting": False}), [photo])["tiles"] == [1]
    small = photo.with_name("small.png")
    from PIL import Image

    Image.new("RGB", (100, 100)).save(small)
    assert axes_of(bundle, read("generic"), [small])["tiles"] == [1], "tiling could have no effect"


def test_interrupted_and_resumed(demo_bundle, photo, monkeypatch) -> None:
    kept = photo.with_suffix(".json")
    found, scripted = search(demo_bundle, photo, monkeypatch, cost, minutes=0.0)
    scripted.interrupt_at = scripted.asked + 10
    assert not tune(found, BIG, minutes=1, kept=kept, sensors=Sensors(photo.parent))  # ends where Ctrl-C came
    assert 5 < len(found.points) <= 10
    again = Tuning(found.bundle, found.profile, found.images, QUESTION, "latency", 0.1, found.axes)
    assert again.resume(kept)
    assert again.points == found.points and again.rounds == found.rounds
    other = Tuning(found.bundle, found.profile, found.images, "Another question", "latency", 0.1, found.axes)
    with pytest.raises(SettingError, match="of another bundle, machine, images or question"):
        other.resume(kept)
    scripted.interrupt_at = scripted.asked + 1
    nothing = Tuning(found.bundle, found.profile, found.images, QUESTION, "latency", 0.1, found.axes)
    with pytest.raises(KeyboardInterrupt):
        tune(nothing, BIG, minutes=1, kept=photo.with_name("none.json"), sensors=Sensors(photo.parent))


def test_flags_that_exclude_others(demo_bundle, photo, monkeypatch) -> None:
    """low_memory as a flag: no neighbour may give it up for a prefill variant."""
    found, _ = search(demo_bundle, photo, monkeypatch, cost, flags={"low_memory": True}, minutes=0.03)
    assert found.axes["low_memory"] == [True]
    assert all(dict(p)["low_memory"] and dict(p)["prefill"] == "none" for p in found.points)


def test_resumed_with_other_flags(demo_bundle, photo, monkeypatch) -> None:
    """Points that a flag excludes now are left out, and none of them is written."""
    found, _ = search(demo_bundle, photo, monkeypatch, cost, minutes=0.03)
    axes = {**found.axes, "threads": [1]}
    again = Tuning(
        found.bundle, with_flags(found.profile, {"threads": 1}), found.images, QUESTION, "latency", 0.1, axes
    )
    assert again.resume(photo.with_suffix(".json"))
    assert again.points and all(dict(p)["threads"] == 1 for p in again.points)
    assert dict(again.chosen())["threads"] == 1


def test_failed_points_are_not_chosen(demo_bundle, photo, monkeypatch) -> None:
    found, _ = search(demo_bundle, photo, monkeypatch, cost, minutes=0.03)
    best = found.chosen()
    found.points[best].failed = "killed by signal 9"
    assert found.chosen() != best and best not in found.front()


def test_what_was_not_tried_is_not_changed(demo_bundle, photo, monkeypatch) -> None:
    """Images that need no tiles say nothing about tiles: the profile written leaves larger ones as they were."""
    from PIL import Image

    small = photo.with_name("small.png")
    Image.new("RGB", (100, 100)).save(small)
    found, _ = search(demo_bundle, small, monkeypatch, cost, minutes=0.02)
    assert "do_image_splitting" not in found.profile_of(found.chosen()).origin
    tried, _ = search(demo_bundle, photo, monkeypatch, cost, minutes=0.02)
    assert tried.profile_of(tried.chosen()).origin["do_image_splitting"] == "tune"


def test_no_point_is_chosen_that_another_outdoes_in_everything(demo_bundle, photo, monkeypatch) -> None:
    """Three points as they were measured once: the first had met the second in one round only, and took it for as fast;
    it was slower than the third in each of three rounds, with more memory and sixty times the loss.
    """
    found, _ = search(demo_bundle, photo, monkeypatch, cost, minutes=0.0)
    first, second, third = (
        tuple(sorted({**dict(found.first_point()), "variant": variant, "prefill": prefill, "arena": arena}.items()))
        for variant, prefill, arena in (("int4", "int8", True), ("int4", "none", True), ("int8", "none", False))
    )
    found.points = {
        first: Measured({5: 95.7, 6: 101.4, 7: 95.9, 8: 96.1, 9: 104.3}, {5: 85.0}, 107.9, 54.7, {}, 0.0062),
        second: Measured({3: 106.2, 4: 106.1, 5: 106.9}, {3: 95.1}, 100.8, 51.4, {}, 0.0191),
        third: Measured({4: 99.7, 5: 98.5, 7: 98.0, 8: 102.0, 9: 98.1}, {4: 84.0}, 99.2, 47.9, {}, 0.0003),
    }
    assert found.chosen() == third
    assert "of 3 points" in found.why()
    assert "one with the least memory (within 2%)" in found.why()
    found.points[second] = Measured({3: 106.2, 4: 106.1, 5: 106.9}, {3: 95.1}, 100.8, 51.4, {}, 0.0191)
    found.points[third] = Measured({3: 97.5, 4: 96.4, 5: 96.5}, {4: 84.0}, 103.8, 47.9, {}, 0.0003)
    assert found.chosen() != second, "clearly slower than one of those that are alike"


def test_unknown_quality_beats_nothing(demo_bundle, photo, monkeypatch) -> None:
    """After a change of the reference KLs are unknown until they are measured again."""
    found, _ = search(demo_bundle, photo, monkeypatch, cost, minutes=0.03)
    worst = max(found.points, key=lambda p: found.points[p].latency)
    for point, measured in found.points.items():
        measured.kl = None if point != worst else 0.0
    assert worst in found.front()


def test_everything_fails(demo_bundle, photo, monkeypatch) -> None:
    found, _ = search(demo_bundle, photo, monkeypatch, cost, minutes=0.0)

    def fails(trial, **_):
        raise TrialError("killed by signal 9")

    monkeypatch.setattr(tuning_module, "start", fails)
    with pytest.raises(TrialError, match="signal 9"):
        tune(found, BIG, minutes=0.1, kept=photo.with_suffix(".json"), sensors=Sensors(photo.parent))


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("rounds"),
        lambda d: d.update(points=[{"settings": 3}]),
        lambda d: d["points"][0].update(latency_ms=5),
        lambda d: d["points"][0]["latency_ms"].update({"0": 0.001}),
        lambda d: d["points"][0]["settings"].update(variant=float("nan")),
    ],
)
def test_damaged_measurements(demo_bundle, photo, monkeypatch, damage) -> None:
    found, _ = search(demo_bundle, photo, monkeypatch, cost, minutes=0.0)
    kept = photo.with_suffix(".json")
    data = json.loads(kept.read_text())
    damage(data)
    kept.write_text(json.dumps(data))
    again = Tuning(found.bundle, found.profile, found.images, QUESTION, "latency", 0.1, found.axes)
    with pytest.raises(SettingError, match="remove it to begin anew"):
        again.resume(kept)


def test_only_fp16(demo_bundle, photo) -> None:
    bundle = Bundle.open(demo_bundle)
    alone = replace(bundle, variants={"fp16": bundle.variants["fp32"]})
    assert axes_of(alone, read("generic"), [photo])["variant"] == ["fp16"]


def test_energy_without_a_sensor(demo_bundle, photo, monkeypatch) -> None:
    with pytest.raises(SettingError, match="energy cannot be measured here: no sensor"):
        search(demo_bundle, photo, monkeypatch, cost, objective="energy")


def test_a_trial_is_what_the_model_does(demo_bundle, photo) -> None:
    """Against the model in this process: tokens, views, and times that add up."""
    from lfm_runtime.model import Model

    seen = []
    profile = with_flags(read("generic"), {"variant": ("fp32",), "threads": 1})
    found = start(Trial(demo_bundle, profile, [photo], QUESTION, 12), watch=seen.append)
    model = Model.load(replace(Bundle.open(demo_bundle), eos=()), profile="generic", variant="fp32", threads=1)
    answer = model.answer([photo], QUESTION, temperature=0, max_new_tokens=12)
    answer.text()
    assert seen
    assert [a.repeat for a in found.answers] == [0, 1]
    assert len({a.text_sha256 for a in found.answers}) == 1
    for times in found.answers:
        assert (times.prompt_tokens, times.views, times.new_tokens) == (
            answer.report.prompt_tokens,
            answer.report.tiles,
            12,
        )
        assert len(times.stage_ms("vision")) == times.views and len(times.token_times) == 12
        assert all(times.started <= s <= e <= times.ended for _, s, e in times.spans)
        parts = sum(sum(times.stage_ms(stage)) for stage in ("image", "preprocess", "vision", "embed", "prefill"))
        decode = times.token_times[-1] - times.token_times[0]
        assert parts + decode <= times.total_ms
    assert found.ready_ms >= found.python_ms + found.import_ms + found.open_ms
    assert set(found.graphs_ms) == {
        f"{stem}.onnx" for stem in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    }
    assert found.kl is None


def test_divergence(demo_bundle, photo, tmp_path) -> None:
    trial = Trial(demo_bundle, read("generic"), [photo], QUESTION, 8, 0, reference=tmp_path)
    assert start(trial).kl == 0.0
    assert start(trial).kl == pytest.approx(0.0, abs=1e-7)
    fewer = start(replace(trial, profile=with_flags(read("generic"), {"do_image_splitting": False})))
    assert fewer.kl > 1e-4
    import numpy as np

    ids = np.load(tmp_path / "0.npz")["ids"].tolist()
    eos = Bundle.open(demo_bundle).eos
    assert len(ids) == 8 or ids[-1] in eos, "up to where the answer ends"
    assert not set(ids[:-1]) & set(eos)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": Path("nowhere")}, "nowhere does not exist"),
        ({"profile": with_flags(read("generic"), {"variant": ("int4",)})}, "has no variant 'int4'"),
    ],
)
def test_trials_that_cannot_be(demo_bundle, photo, change, message) -> None:
    with pytest.raises(TrialError, match=message):
        start(replace(Trial(demo_bundle, read("generic"), [photo]), **change))


def test_trial_killed(demo_bundle, photo) -> None:
    import os
    import signal

    with pytest.raises(TrialError, match="killed by signal 9"):
        start(Trial(demo_bundle, read("generic"), [photo]), watch=lambda pid: os.kill(pid, signal.SIGKILL))


def test_tune_writes_a_profile_that_run_takes(demo_bundle, photo, tmp_path, capsys) -> None:
    """`tune` writes a profile that `run` takes."""
    written = tmp_path / "mine.toml"
    words = [
        "tune",
        str(demo_bundle),
        str(photo),
        "-o",
        str(written),
        "--threads",
        "1",
        "--variant",
        "fp32",
        "-p",
        QUESTION,
    ]
    assert main([*words, "--minutes", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "* fp32" in out and "written" in out
    assert main(["profile", "validate", str(written)]) == 0
    assert read(str(written)).threads == 1
    assert json.loads(written.with_suffix(".json").read_text())["points"]
    capsys.readouterr()
    assert (
        main(["run", str(demo_bundle), str(photo), "-p", QUESTION, "--profile", str(written), "--max-new-tokens", "4"])
        == 0
    )
    assert "profile mine" in capsys.readouterr().err
    assert main([*words, "--minutes", "0"]) == 0, "chooses from what was measured before"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune", "BUNDLE", "PHOTO", "--minutes", "-1"], "minutes -1 is impossible"),
        *((["tune", "BUNDLE", "PHOTO", "--floor", f], f"--floor {f} is impossible") for f in ("nan", "inf", "-1", "0")),
        (["tune", "BUNDLE", "PHOTO", "--minutes", "0", "-o", "new.toml"], "nothing was measured before"),
        (["tune", "BUNDLE", "PHOTO", "-p", ""], "the question is empty"),
        (["tune", "BUNDLE", "PHOTO", "-o", "x.json"], "x.json cannot be written as a profile"),
        (["tune", "BUNDLE", "nowhere.png"], "nowhere.png does not exist"),
    ],
)
def test_command_refuses(demo_bundle, photo, capsys, words, message) -> None:
    places = {"BUNDLE": str(demo_bundle), "PHOTO": str(photo)}
    assert main([places.get(word, word) for word in words]) == 2
    assert message in capsys.readouterr().err


def test_a_profile_written_by_hand_is_not_replaced(demo_bundle, photo, tmp_path, capsys) -> None:
    """Nor one of tune's that somebody edited; --force replaces it."""
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "pi5"  # ours\n')
    words = ["tune", str(demo_bundle), str(photo), "--minutes", "0", "-o", str(mine)]
    assert main(words) == 2
    assert f"{mine} exists, and lfm-edge tune did not write it" in capsys.readouterr().err
    assert mine.read_text() == 'extends = "pi5"  # ours\n'
    text = sealed("threads = 2\n", "lfm-edge tune")
    mine.write_text(text)
    assert is_sealed(mine)
    assert read(str(mine)).threads == 2
    mine.write_text(text.replace("threads = 2", "threads = 3"))
    assert not is_sealed(mine)
    assert main(words) == 2
    mine.with_suffix(".json").write_text('{"tool": "mine"}')
    assert main([*words, "--force"]) == 2
    assert "mine.json exists, and lfm-edge tune did not write it" in capsys.readouterr().err
