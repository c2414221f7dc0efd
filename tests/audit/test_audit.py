"""Audits of the demo model: what they say against what the run did, what makes them invalid, and what wrong input gets."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lfm_audit import audit as audit_module
from lfm_audit.audit import audit
from lfm_audit.figures import Figure
from lfm_audit.images import SIZES, find_images, make_images
from lfm_audit.measure.trial import start
from lfm_audit.reading import read_audit
from lfm_audit.result import Audit, Limit, Verdict
from lfm_audit.workload import QUESTION, Subject, Workload
from lfm_profiles import detect, read, with_flags
from lfm_profiles.sensors import Sensors
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import EdgeError, ImageError
from profiles.trees import write

pytestmark = [pytest.mark.process, pytest.mark.newest_python]

SCHEMA = Path(audit_module.__file__).with_name("audit.schema.json")
TREE = {
    "sys/class/thermal/thermal_zone0/temp": "41000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "0\n",
}


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    monkeypatch.setattr(audit_module, "_IDLE_S", 0.1)


@pytest.fixture
def images(tmp_path) -> dict[str, Path]:
    found = make_images(tmp_path)
    return {"small": found["small"]}


@pytest.fixture
def processes(monkeypatch):
    """A function: audits measure so many processes, however busy the machine is with other tests."""
    return lambda count: monkeypatch.setattr(
        audit_module, "_schedule", lambda work: [("warm", s) for _ in range(count) for s in work.subjects]
    )


def work(bundle: Path, images: dict[str, Path], **more) -> Workload:
    profile = with_flags(read("generic"), {"prepared": False, "threads": 1, **more.pop("flags", {})})
    return Workload(
        Bundle.open(bundle), profile, [Subject("fp32", profile)], images, **{"new_tokens": 8, "budget_s": 600.0, **more}
    )


def done(workload: Workload, sensors: Sensors, progress=lambda _: None) -> dict:
    return json.loads(audit(workload, detect(), sensors, progress).to_text())


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
    assert times["image"] == pytest.approx(opening, rel=0.01)
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


# ------------------------------------------------------------------------------------------------------------ verdict


def reasons(result: dict) -> str:
    assert result["verdict"]["valid"] == (not result["verdict"]["reasons"])
    return "; ".join(result["verdict"]["reasons"])


def test_background_load(demo_bundle, images, tmp_path, processes) -> None:
    processes(1)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        result = done(work(demo_bundle, images), Sensors(write(tmp_path / "tree", TREE)))
    finally:
        for process in busy:
            process.kill()
    assert "background load" in reasons(result)


def test_throttle_bit(demo_bundle, images, tmp_path, processes) -> None:
    processes(1)
    tree = write(tmp_path / "tree", TREE)

    def hot(text: str) -> None:
        if "processes measured" in text:
            (tree / "sys/devices/platform/soc/soc:firmware/get_throttled").write_text("20002\n")

    result = done(work(demo_bundle, images), Sensors(tree), hot)
    assert "throttled: the firmware's bits were 0x0 before and 0x20002 after" in reasons(result)
    old = write(tmp_path / "old", {**TREE, "sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n"})
    assert "throttled" not in reasons(done(work(demo_bundle, images), Sensors(old))), "what was before is not ours"


def test_exchanged_model(bundle_copy, images, tmp_path, processes) -> None:
    processes(1)
    weights = bundle_copy / "onnx" / "decoder_model_merged.onnx_data"

    def exchange(_: str) -> None:
        shutil.copy(weights, tmp_path / "same")
        (tmp_path / "same").replace(weights)

    assert "files were changed" in reasons(
        done(work(bundle_copy, images), Sensors(write(tmp_path / "tree", TREE)), exchange)
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda answer, n: replace(answer, text_sha256=str(n)), "output changed"),
        (
            lambda answer, _: replace(
                answer, ended=answer.started, spans=[(s, answer.started, answer.started) for s, *_ in answer.spans]
            ),
            "the clock stood still",
        ),
    ],
)
def test_answers_that_cannot_be(demo_bundle, images, tmp_path, monkeypatch, change, word, processes) -> None:
    processes(3)
    calls = iter(range(100))

    def odd(trial, **more):
        outcome = start(trial, **more)
        n = next(calls)
        return replace(outcome, answers=[change(answer, n) for answer in outcome.answers])

    monkeypatch.setattr(audit_module, "start", odd)
    assert word in reasons(done(work(demo_bundle, images), Sensors(write(tmp_path / "tree", TREE))))


def test_frequency_that_falls_and_swap(made) -> None:
    """The verdict is judged from a machine's figures; nothing is measured."""
    from lfm_audit.verdict import judge

    whole = read_audit(made)

    def machine(**more) -> Audit:
        speeds = more.pop("speeds", [2400.0] * 30)
        samples = tuple(replace(whole.machine.samples[0], frequency_mhz=s) for s in speeds)
        found = replace(whole.machine, background_share=Figure.of([0.0]), samples=samples, **more)
        return replace(whole, variants={}, machine=found)

    def said(result: Audit, elapsed=(60.0, 60.0)) -> str:
        return "; ".join(judge(result, changed_files=False, elapsed=elapsed).reasons)

    assert said(machine()) == ""
    assert "the frequency fell from 2400 to 1500" in said(machine(speeds=[2400.0] * 20 + [1500.0] * 10))
    assert said(machine(speeds=[600.0] * 3 + [2400.0] * 30)) == "", "an idle processor that wakes is not throttled"
    assert "swapped: 12 MiB" in said(machine(swapped_mib=12.0))
    assert "the clock stood still or jumped" in said(machine(), elapsed=(60.0, 3660.0))


def test_interrupted(demo_bundle, images, tmp_path, processes) -> None:
    processes(4)

    def stop(text: str) -> None:
        if "2 processes measured" in text:
            raise KeyboardInterrupt

    result = done(work(demo_bundle, images), Sensors(write(tmp_path / "tree", TREE)), stop)
    assert result["partial"] and list(result["variants"]) == ["fp32"]
    assert "too few processes" in reasons(result)


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


def test_a_late_failure_keeps_what_was_measured(demo_bundle, images, tmp_path, monkeypatch, processes) -> None:
    from lfm_audit.measure.trial import TrialError

    processes(4)
    calls = iter(range(100))

    def fails(trial, **more):
        if next(calls) == 2:
            raise TrialError("the measured process was killed by signal 9")
        return start(trial, **more)

    monkeypatch.setattr(audit_module, "start", fails)
    result = done(work(demo_bundle, images), Sensors(write(tmp_path / "tree", TREE)))
    assert result["partial"] and "signal 9" in result["stopped"]
    assert result["variants"]["fp32"]["starts"]["warm"]["ready_ms"]["n"] == 2


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


def cpu_seconds(process) -> float | None:
    """What a process has computed so far; None when it has ended."""
    import psutil

    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else sum(process.cpu_times()[:2])
    except psutil.NoSuchProcess:
        return None


def test_sigterm_keeps_what_was_measured(demo_bundle, tmp_path) -> None:
    """SIGTERM keeps what was measured; the process measured does not go on, also when its parent is killed."""
    import signal

    import psutil

    code = "import sys; from lfm_runtime.commands import console; console._PAUSE_S = 0  # every line\n"
    code += "from lfm_runtime.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [
        sys.executable,
        "-c",
        code,
        "audit",
        str(demo_bundle),
        "--profile",
        "generic",
        "--new-tokens",
        "120",
        "-o",
        str(tmp_path / "a.json"),
    ]
    for signal_, kept in ((signal.SIGTERM, True), (signal.SIGKILL, False)):
        with subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            next(line for line in process.stderr if "2 processes measured" in line)
            children = []
            while not children:
                children = psutil.Process(process.pid).children()
            process.send_signal(signal_)
            process.wait()
            before = {child: cpu_seconds(child) for child in children}
        for child in children:
            while (now := cpu_seconds(child)) is not None:  # in seconds of work, however busy the machine is
                assert now - (before[child] or 0) < 3, "a process goes on measuring for nobody"
        assert (tmp_path / "a.json").exists() == kept
        if kept:
            assert json.loads((tmp_path / "a.json").read_text())["stopped"] == "interrupted"
            (tmp_path / "a.json").unlink()


# ------------------------------------------------------------------------------------------------------------- limits


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


# -------------------------------------------------------------------------------------------------------------- input


def test_images_found(tmp_path, images) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(images["small"], folder / "a.png")
    (folder / "b.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("hello")
    (folder / "cut.png").write_bytes(images["small"].read_bytes()[:2000])
    found, skipped = find_images(folder)
    assert list(found) == ["a.png"]
    assert [entry["name"] for entry in skipped] == [
        "b.jpg",
        "cut.png",
        "notes.txt",
    ] and "not a readable image" in skipped[0]["reason"]
    (folder / "a.png").unlink()
    with pytest.raises(ImageError, match="holds no image that can be read"):
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


def test_trial_errors_are_told(bundle_copy, images, tmp_path, processes) -> None:
    processes(1)
    workload = work(bundle_copy, images)
    (bundle_copy / "onnx" / "vision_encoder.onnx").write_bytes(b"damaged")
    with pytest.raises(EdgeError, match="vision_encoder"):
        done(workload, Sensors(tmp_path))


def test_soak(demo_bundle, images, tmp_path, processes) -> None:
    processes(1)
    result = done(work(demo_bundle, images, soak_minutes=0.05), Sensors(write(tmp_path / "tree", TREE)))
    soak = result["soak"]
    assert (soak["variant"], soak["steady"]) == ("fp32", False)
    assert soak["minutes"][0]["answers"] > 3 and soak["minutes"][0]["temperature_c"] == 41.0
    assert soak["ttft_change"] == 0.0, "one minute against itself"


def test_a_variant_that_is_added_meanwhile_ends_it(demo_bundle, images, processes, monkeypatch) -> None:
    """It would be used from then on; what was measured before is kept."""
    processes(3)
    real, outcomes = audit_module.start, []

    def started(*given, **more):
        outcomes.append(real(*given, **more))
        return replace(outcomes[-1], prefill="int8") if len(outcomes) == 3 else outcomes[-1]

    monkeypatch.setattr(audit_module, "start", started)
    found = done(work(demo_bundle, images), Sensors())
    assert "was given int8 meanwhile" in found["stopped"]
    assert len(found["variants"]["fp32"]["starts"]["warm"]["ready_ms"]["samples"]) == 2
