"""Audits of the demo model: what they say against what the run did, and what wrong input gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from auditing import TREE, done, work
from lfm_audit import audit as audit_module
from lfm_audit.images import SIZES, find_images, make_images
from lfm_audit.reading import read_audit
from lfm_audit.result import Limit, Verdict
from lfm_audit.workload import QUESTION
from lfm_profiles.sensors import Sensors
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import ImageError
from profiles.trees import write

pytestmark = [pytest.mark.process, pytest.mark.newest_python]

SCHEMA = Path(audit_module.__file__).with_name("audit.schema.json")


@pytest.fixture(scope="module")
def written(demo_bundle, tmp_path_factory) -> Path:
    """An audit as the command makes it, of three sizes of image."""
    path = tmp_path_factory.mktemp("audit") / "audit.json"
    words = [
        "audit",
        str(demo_bundle),
        "-o",
        str(path),
        "--profile",
        "generic",
        "--new-tokens",
        "12",
        "--quiet",
        "--csv",
        str(path.with_suffix(".csv")),
        "--force",
    ]
    path.with_suffix(".csv").write_bytes(b"date,price\xff\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            audit_module,
            "_schedule",
            lambda work: [(kind, s) for kind in ("warm", "cold", "first_ever", "warm", "warm") for s in work.subjects],
        )
        assert main(words) in (0, 3)  # other tests run beside this one
    return path


def test_schema(written) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema, result = json.loads(SCHEMA.read_text()), json.loads(written.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(result, schema)
    for path in (
        ("machine",),
        ("verdict",),
        ("variants", "fp32", "memory"),
        ("variants", "fp32", "images", "small", "stages"),
    ):
        place = broken = json.loads(written.read_text())
        for key in path:
            place = place[key]
        place["another"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_what_it_says(written, demo_bundle) -> None:
    result = json.loads(written.read_text())
    fp32 = result["variants"]["fp32"]
    assert set(fp32["images"]) == set(SIZES)
    assert fp32["images"]["small"]["views"] < fp32["images"]["large"]["views"]
    for image in fp32["images"].values():
        total = image["total_ms"]
        for stage in image["stages"].values():
            assert stage["n"] == total["n"]
        for n, ms in enumerate(total["samples"]):
            assert sum(stage["samples"][n] for stage in image["stages"].values()) == pytest.approx(ms, abs=0.01), (
                "nothing is left out"
            )
        shares = [
            other / ms for other, ms in zip(image["stages"]["other_ms"]["samples"], total["samples"], strict=True)
        ]
        assert min(shares) <= 0.03, (
            "stages add up to the total; where other tests take the processor between two of them, not in every answer"
        )
        assert len(image["text_sha256"]) == 1
        assert image["inter_token_ms"]["n"] == total["n"] * 11
        assert image["ttft_ms"]["median"] < total["median"]
    memory = fp32["memory"]
    assert memory["peak_mib"]["median"] >= memory["anonymous_mib"]["median"] + memory["mapped_mib"]["median"] - 1
    assert memory["timeline"] and "load" in memory["per_stage"]
    assert fp32["starts"]["warm"]["ready_ms"]["median"] >= fp32["starts"]["warm"]["import_ms"]["median"]
    assert (
        fp32["starts"]["cold"]
        and fp32["starts"]["first_ever"]["import_ms"]["median"] > fp32["starts"]["warm"]["import_ms"]["median"]
    )
    assert fp32["prepare_ms"] > 0, "generic uses what prepare writes"
    assert not list(demo_bundle.parent.glob(".lfm-edge-audit-*"))
    header, *rows = written.with_suffix(".csv").read_text().splitlines()
    assert len(rows) == 3 and all(len(row.split(",")) >= len(header.split(",")) for row in rows)


def test_plan_knows_the_times_then(written, demo_bundle, capsys) -> None:
    image = make_images(written.parent)["512x512"]
    assert main(["plan", str(demo_bundle), str(image), "--profile", "generic", "-p", QUESTION, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    times = told["times_ms"]
    known = json.loads(written.read_text())["variants"]["fp32"]["images"]["512x512"]
    opening = sum(known["stages"][stage]["median"] for stage in ("image_ms", "preprocess_ms"))
    assert times["image_preprocess"] == pytest.approx(opening, rel=0.01)
    assert told["times_valid"] is json.loads(written.read_text())["verdict"]["valid"]
    assert times["vision"] == pytest.approx(known["stages"]["vision_ms"]["median"], rel=0.5)
    assert times["prefill"] == pytest.approx(known["stages"]["prefill_ms"]["median"], rel=0.01)
    assert main(["plan", str(demo_bundle), "--profile", "generic", "--threads", "1"]) == 0
    assert "unknown until this variant is audited" in capsys.readouterr().out or os.cpu_count() == 1


@pytest.mark.skipif(not Path("/usr/bin/time").exists(), reason="needs /usr/bin/time")
def test_peak_is_what_time_says(demo_bundle, images, tmp_path, monkeypatch, processes) -> None:
    """The same process under /usr/bin/time -v: maximum resident set within 2 %."""
    from lfm_audit.measure import trial as trial_module

    real = subprocess.Popen
    log = tmp_path / "time.txt"
    processes(1)
    monkeypatch.setattr(
        trial_module.subprocess,
        "Popen",
        lambda words, **more: real(["/usr/bin/time", "-v", "-o", str(log), *words], **more),
    )
    result = done(work(demo_bundle, images), Sensors(write(tmp_path / "tree", TREE)))
    peak = result["variants"]["fp32"]["memory"]["peak_mib"]
    said = next(int(line.split()[-1]) for line in log.read_text().splitlines() if "Maximum resident" in line) / 1024
    assert peak["n"] == 1
    assert peak["max"] == pytest.approx(said, rel=0.02)


def test_meter(demo_bundle, tmp_path, capsys, monkeypatch) -> None:
    """Through the command, with a meter that writes while the audit runs, and is read when it is over."""
    import threading
    import time

    path, stop = tmp_path / "watts.csv", threading.Event()

    def log() -> None:
        with path.open("w") as f:
            f.write("time_s,power_w\n")
            while not stop.is_set():
                f.write(f"{time.time()},5.0\n")
                f.flush()
                time.sleep(0.05)

    monkeypatch.setattr(audit_module, "_schedule", lambda work: [("warm", s) for s in work.subjects])
    thread = threading.Thread(target=log)
    thread.start()
    try:
        words = [
            "audit",
            str(demo_bundle),
            "--profile",
            "generic",
            "--quiet",
            "--new-tokens",
            "8",
            "-o",
            str(tmp_path / "a.json"),
        ]
        assert main([*words, "--meter", str(path)]) in (0, 3)
    finally:
        stop.set()
        thread.join()
    result = json.loads((tmp_path / "a.json").read_text())
    image = result["variants"]["fp32"]["images"]["large"]
    assert result["machine"]["mean_w"] == pytest.approx(5.0)
    assert image["energy_per_answer_j"]["median"] == pytest.approx(5.0 * image["total_ms"]["median"] / 1e3, rel=0.05)
    assert "power" not in result["machine"]["missing"]
    path.write_text("time_s,power_w\n1,5\n2,5\n")
    assert main([*words, "--meter", str(path)]) in (0, 3)
    late = json.loads((tmp_path / "a.json").read_text())
    assert (
        "has no sample of the time of this audit" in late["machine"]["missing"]["meter"]
        and late["machine"]["mean_w"] is None
    )


def test_low_memory(demo_bundle, images, tmp_path, processes, monkeypatch) -> None:
    """Graphs that every answer loads anew are a stage of it."""
    processes(1)
    result = done(work(demo_bundle, images, flags={"low_memory": True}), Sensors(write(tmp_path / "tree", TREE)))
    image = result["variants"]["fp32"]["images"]["small"]
    assert image["stages"]["load_ms"]["median"] > 0.3 * image["ttft_ms"]["median"]
    assert image["stages"]["other_ms"]["median"] < 0.1 * image["total_ms"]["median"]


def test_one_token(demo_bundle, images, tmp_path, processes) -> None:
    """No rate where there is nothing between tokens: not zero, but not measured."""
    processes(1)
    result = done(
        work(demo_bundle, images, new_tokens=1, soak_minutes=0.02, limits={"decode_tok_s": 1.0}),
        Sensors(write(tmp_path / "t", TREE)),
    )
    image = result["variants"]["fp32"]["images"]["small"]
    assert image["decode_tok_s"] is None and image["inter_token_ms"] is None
    assert result["limits"] == [
        {"name": "decode_tok_s", "limit": 1.0, "variant": None, "image": None, "measured": None, "holds": False}
    ]
    assert result["soak"]["minutes"][0]["inter_token_ms"] is None


def test_limits(written, demo_bundle, capsys, processes) -> None:
    processes(1)
    words = ["audit", str(demo_bundle), "--profile", "generic", "--new-tokens", "4", "--quiet"]
    code = main([*words, "--limit", "peak_rss_mib=10", "--limit", "decode_tok_s=0.001"])
    out = capsys.readouterr().out
    assert "BROKEN peak_rss_mib 10" in out and "holds  decode_tok_s 0.001" in out
    assert code in (1, 3), "broken, or not valid, which comes first"


def test_exit_codes(written, monkeypatch, demo_bundle, capsys) -> None:
    for valid, holds, code in ((True, True, 0), (True, False, 1), (False, True, 3), (False, False, 3)):
        limit = Limit("ttft_ms", 1.0, "fp32", None, 2.0, holds)
        changed = replace(read_audit(written), verdict=Verdict(valid, ()), limits=(limit,))
        monkeypatch.setattr(audit_module, "audit", lambda *_, changed=changed: changed)
        assert main(["audit", str(demo_bundle), "--quiet"]) == code


def test_images_found(tmp_path, images) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(images["small"], folder / "a.png")
    (folder / "b.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("hello")
    (folder / "cut.png").write_bytes(images["small"].read_bytes()[:2000])
    found, skipped = find_images(folder)
    assert list(found) == ["a.png"]
    assert [entry["name"] for entry in skipped] == ["b.jpg", "cut.png"]  # texts beside images are no images left out
    assert "not a readable image" in skipped[0]["reason"]
    (folder / "a.png").unlink()
    with pytest.raises(
        ImageError, match=r"holds no image that can be read \(3 files looked at; \S+b\.jpg is not a readable"
    ):
        find_images(folder)
    with pytest.raises(ImageError, match="not a folder of images"):
        find_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "soon"], "--budget soon is not a time"),
        (["--budget", "0.001s", "--quiet"], "is too short: one process took"),
        (["--limit", "speed=3"], "there is no 'speed'"),
        (["--limit", "ttft_ms=fast"], "'fast' is not a number"),
        (["--limit", "ttft_ms=-5"], "is impossible"),
        (["--variants", "int2"], "there is no variant 'int2'"),
        (["--variants", "fp32,fp32"], "names one twice"),
        (["--variants", "fp32", "--variant", "fp32"], "--variant has no effect"),
        (["--new-tokens", "0"], "new-tokens 0 is impossible"),
        (["-p", " "], "the question is empty"),
        (["--soak", "-1"], "soak -1"),
        (["--soak", "inf"], "soak inf is impossible; allowed: 2 to 100000 minutes"),
        (["-o", "nowhere/audit.json"], "is not a folder"),
        (["--meter", "nowhere/watts.csv"], "nowhere is not a folder: no meter can write watts.csv there"),
        (["--images", "nowhere"], "nowhere is not a folder of images"),
    ],
)
def test_audits_that_cannot_be_are_refused_before_measuring(demo_bundle, capsys, words, message) -> None:
    assert main(["audit", str(demo_bundle), "--profile", "generic", *words]) == 2
    assert message in capsys.readouterr().err


def test_soak(demo_bundle, images, tmp_path, processes) -> None:
    processes(1)
    result = done(work(demo_bundle, images, soak_minutes=0.05), Sensors(write(tmp_path / "tree", TREE)))
    soak = result["soak"]
    assert (soak["variant"], soak["steady"]) == ("fp32", False)
    assert soak["minutes"][0]["answers"] > 3 and soak["minutes"][0]["temperature_c"] == 41.0
    assert soak["ttft_change"] == 0.0, "one minute against itself"
