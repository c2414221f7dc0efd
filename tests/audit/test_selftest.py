"""Golden values and the checks of an installed bundle: what is right passes, each thing that is wrong is found and
named.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lfm_audit import selftest
from lfm_audit.selftest import CHECKS, CheckError, Installed, Skipped
from lfm_runtime import golden
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import BundleError
from lfm_runtime.formats.typed import read_as
from lfm_runtime.model import Model
from lfm_runtime.setup.machine import this_machine

ROOT = Path(__file__).resolve().parents[2]
QUICK = [check for check in CHECKS if check.name not in ("steady memory", "full disk", "read-only bundle")]


@pytest.fixture
def installed(demo_bundle) -> Installed:
    return Installed(demo_bundle, "generic", "fp32")


def check(name: str):
    return next(check for check in CHECKS if check.name == name)


def as_golden(kept: dict) -> golden.Golden:
    return read_as(golden.Golden, kept, Path("manifest.json"), BundleError, "make it again")


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_recorded_at_export(demo_bundle, demo_model) -> None:
    kept = manifest(demo_bundle)["golden"]["fp32"]
    assert len(kept["steps"]) == len(kept["tokens"]) == golden.STEPS
    found = golden.compare(demo_model, as_golden(kept))
    assert found.problems("fp32") == []
    assert (found.texts, found.prompt, found.tokens) == ((), False, False)
    assert max(found.features, found.logits) < 1e-4
    assert demo_model.prompts.tokenizer.decode(kept["tokens"]).startswith(
        demo_model.answer(
            [golden.golden_image()], golden.QUESTION, temperature=0, repetition_penalty=1, max_new_tokens=4
        ).text()
    ), "what it says is what the model answers"


def test_image_is_the_same_everywhere() -> None:
    import hashlib

    pixels = np.asarray(golden.golden_image())
    assert pixels.shape == (192, 256, 3)
    assert (
        hashlib.sha256(pixels.tobytes()).hexdigest()
        == "4a442c7613dc0ae3c54e1bba336c2a46023b841f6f503e768661c3b67adc975a"
    )
    assert pixels[10, 20].tolist() == [20 * 3 + 10 * 2, 20 * 10 // 64 + 40, 35]


def damaged(kept: dict, where: str) -> dict:
    kept = json.loads(json.dumps(kept))
    if where == "texts":
        kept["texts"][3] = [1, 2, 3]
    elif where == "prompt":
        kept["prompt"] = kept["prompt"][:-1]
    elif where == "patches":
        kept["patches"][5] += 0.1
    elif where == "features":
        kept["features"] = [x * 1.01 for x in kept["features"]]
    elif where == "logits":
        for step in kept["steps"]:
            step["logits"] = [x + (0.05 * step["std"] if n % 2 else 0) for n, x in enumerate(step["logits"])]
    elif where == "tokens":
        kept["tokens"][0] = (kept["tokens"][0] + 1) % 100
        kept["steps"][0]["ahead"] = 10 * kept["steps"][0]["std"]
    return kept


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("texts", "the tokenizer gives other ids for"),
        ("prompt", "golden prompt has other token ids"),
        ("patches", "patches differ by up to 0.1"),
        ("features", "the relative error of the image features is 0.0"),
        ("logits", "the relative error of the logits is"),
        ("tokens", "another token is most likely"),
    ],
)
def test_differences_are_found(demo_bundle, demo_model, where, message) -> None:
    kept = manifest(demo_bundle)["golden"]["fp32"]
    problems = golden.compare(demo_model, as_golden(damaged(kept, where))).problems("fp32")
    assert any(message in problem for problem in problems)


def test_wrong_weights_are_found(bundle_copy) -> None:
    """A bit of one weight's exponent, in the middle of the encoder: hashes tell, and golden values do where nobody
    hashes.
    """
    weights = bundle_copy / "onnx" / "vision_encoder.onnx_data"
    data = np.fromfile(weights, np.float32)
    biggest = int(np.argmax(np.abs(data[: len(data) // 2])))
    data[biggest] *= 64
    on = Installed(bundle_copy, "generic", "fp32")
    data.tofile(weights)
    with pytest.raises(CheckError, match="is damaged"):
        check("files and hashes").run(on)
    with pytest.raises(CheckError, match="error of the image features"):
        check("golden values").run(on)


def test_damaged_golden_values(bundle_copy) -> None:
    found = manifest(bundle_copy)
    del found["golden"]["fp32"]["steps"]
    (bundle_copy / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(BundleError, match="export and quantize again"):
        golden.compare(Model.load(bundle_copy, profile="generic"), golden.golden_of(Bundle.open(bundle_copy), "fp32"))
    del found["golden"]
    (bundle_copy / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(Skipped, match="no golden values"):
        check("golden values").run(Installed(bundle_copy, "generic", "fp32"))


def test_large_weights_are_run_apart(bundle_copy, monkeypatch) -> None:
    """As for a 450M: in a process of its own, with the same result."""
    before = manifest(bundle_copy)["golden"]["fp32"]
    monkeypatch.setattr(golden, "_SMALL", 0)
    assert golden.add_golden(bundle_copy, "fp32") is None
    after = manifest(bundle_copy)["golden"]["fp32"]
    assert after["tokens"] == before["tokens"] and after["prompt"] == before["prompt"]
    assert np.allclose(after["features"], before["features"], atol=1e-3)
    assert np.allclose([s["ahead"] for s in after["steps"]], [s["ahead"] for s in before["steps"]], atol=1e-3)
    (bundle_copy / "onnx" / "decoder_model_merged.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError, match="could not be recorded"):
        golden.add_golden(bundle_copy, "fp32")
    monkeypatch.setattr(golden, "module", lambda *_: ["/bin/sh", "-c", "kill -9 $$"])
    assert "could not be recorded" in golden.add_golden(
        bundle_copy, "fp32"
    )  # killed: this machine's memory, not the bundle


def test_all_checks(demo_bundle, capsys) -> None:
    assert main(["selftest", str(demo_bundle), "--profile", "generic", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    outcomes = {entry["name"]: entry["outcome"] for entry in found["checks"]}
    assert set(outcomes) == {c.name for c in CHECKS}
    for name in (
        "files and hashes",
        "golden values",
        "graphs load",
        "answers",
        "steady memory",
        "cancelled answers",
        "full disk",
        "read-only bundle",
    ):
        assert outcomes[name] == "ok", found
    assert outcomes["budgets"] == "skipped" and found["failed"] == []
    assert outcomes["answers in a schema"] == ("ok" if find_spec("llguidance") else "skipped")


def test_a_failure_does_not_hide_others(demo_bundle, monkeypatch, capsys) -> None:
    def broken(_: Installed) -> str:
        raise CheckError("it is broken; mend it")

    def crashes(_: Installed) -> str:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(
        selftest,
        "CHECKS",
        (selftest.Check("one", "cpu", broken), selftest.Check("two", "cpu", crashes), check("answers")),
    )
    assert main(["selftest", str(demo_bundle), "--profile", "generic"]) == 1
    out = capsys.readouterr().out
    assert "FAILED   one" in out and "mend it" in out
    assert "ZeroDivisionError: oops; report it" in out
    assert "ok       answers" in out
    assert "FAILED: one, two" in out


LEAKING = """if True:
    import sys
    from pathlib import Path
    import numpy as np
    from lfm_audit import selftest
    from lfm_audit.selftest import CHECKS, CheckError, Installed
    on = Installed(Path(sys.argv[1]), "generic", "fp32")
    leak, converse = [], on.model.converse
    def leaking(*args, **more):
        leak.append(np.ones(1 << 20, np.float32))  # four MiB an answer
        return converse(*args, **more)
    on.model.converse, selftest._ANSWERS = leaking, 20
    for name in ("steady memory", "cancelled answers"):
        try:
            print(name, next(check for check in CHECKS if check.name == name).run(on))
        except CheckError as e:
            print(name, "FAILED", e)
"""


def test_memory_that_grows_is_found(demo_bundle) -> None:
    """In a process of its own: here, memory that other tests give back would hide it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", LEAKING, str(demo_bundle)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    steady, cancelled = done.stdout.splitlines()
    assert "FAILED memory grew by" in steady
    assert "FAILED memory grew by" in cancelled


@pytest.mark.parametrize(
    ("budget", "message"),
    [("ttft_ms = 1", "ttft_ms 1: "), ("decode_tok_s = 1000000", "decode_tok_s 1e\\+06"), ("peak_rss_mib = 4000", None)],
)
def test_budgets(demo_bundle, tmp_path, budget, message) -> None:
    profile = tmp_path / "tight.toml"
    profile.write_text(f'extends = "generic"\n[budget]\n{budget}\n')
    on = Installed(demo_bundle, str(profile), "fp32")
    if message is None:
        assert "first token" in check("budgets").run(on)
    else:
        with pytest.raises(CheckError, match=message):
            check("budgets").run(on)


def test_a_budget_of_tokens_a_second_counts_pauses(installed, monkeypatch, tmp_path) -> None:
    """15 tokens in 30 ms and a pause of 270: 50 a second, as an audit says, and not the 500 of most of them."""
    profile = tmp_path / "tight.toml"
    profile.write_text('extends = "generic"\n[budget]\ndecode_tok_s = 100\n')
    on = Installed(installed.folder, str(profile), "fp32")
    times = [100.0 + 2 * n + (270 if n > 7 else 0) for n in range(16)]
    answer = SimpleNamespace(token_times=times, new_tokens=16, started=0.0)
    outcome = SimpleNamespace(answers=[answer] * 3, memory_mib={"peak": 100.0})
    monkeypatch.setattr(selftest, "start", lambda _: outcome)
    with pytest.raises(CheckError, match=r"decode_tok_s 100: 50\.0 tok/s"):
        check("budgets").run(on)


def test_bundle_that_is_written_to_is_found(installed, monkeypatch) -> None:
    """A file that appears in the folder it runs from, as root could make one."""
    real = selftest.run_command

    def writes(words: list[str], **more):
        place = Path(words[1])
        mode = place.stat().st_mode
        place.chmod(0o755)
        (place / "cache.bin").write_text("x")
        place.chmod(mode)
        return real(words, **more)

    monkeypatch.setattr(selftest, "run_command", writes)
    with pytest.raises(CheckError, match="wrote into the bundle's folder"):
        check("read-only bundle").run(installed)


def test_profile_with_other_image_sizes(demo_bundle, tmp_path) -> None:
    """Golden values are of the checkpoint's own settings: a profile with smaller images changes nothing about them."""
    small = tmp_path / "small.toml"
    small.write_text('extends = "generic"\nmin_image_tokens = 8\nmax_image_tokens = 16\ndo_image_splitting = false\n')
    assert "fp32" in check("golden values").run(Installed(demo_bundle, str(small), "fp32"))


def test_boards(installed, monkeypatch, tmp_path) -> None:
    from lfm_profiles import detect
    from lfm_profiles.sensors import Sensors
    from profiles.trees import DEVICES, write

    tree = write(tmp_path / "pi4", DEVICES["pi4-2gb"][0])
    monkeypatch.setattr(selftest.platform, "machine", lambda: "aarch64")
    board = replace(this_machine(), device=detect(tree, system="Linux", machine="aarch64"))
    monkeypatch.setattr(selftest, "this_machine", lambda: board)
    assert "asimd" in check("arm").run(installed)
    monkeypatch.setattr(
        selftest,
        "Sensors",
        lambda: Sensors(
            write(
                tmp_path / "hot",
                {**DEVICES["pi4-2gb"][0], "sys/devices/platform/soc/soc:firmware/get_throttled": "4\n"},
            )
        ),
    )
    with pytest.raises(CheckError, match="throttled now"):
        check("sensors").run(installed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["BUNDLE", "--profile", "zzz"], "there is no profile 'zzz'"),
        (["BUNDLE", "--variant", "int4"], "has no variant 'int4'"),
    ],
)
def test_selftests_of_nothing_are_refused(demo_bundle, capsys, words, message) -> None:
    assert main(["selftest", *(str(demo_bundle) if word == "BUNDLE" else word for word in words)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "left", "said"),
    [
        ("config.json", None, "config.json is missing"),
        ("manifest.json", 30, "manifest.json is not valid JSON"),
        ("onnx/decoder_model_merged.onnx_data", 100, "has 100 bytes, the manifest says"),
    ],
)
def test_a_bundle_that_cannot_be_opened_fails(bundle_copy, capsys, name, left, said) -> None:
    """Its first check fails, as for a file with a wrong byte."""
    path = bundle_copy / name
    content = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(content[:left])
    assert main(["selftest", str(bundle_copy)]) == 1
    found = capsys.readouterr()
    assert found.out.startswith(f"FAILED   {CHECKS[0].name}") and said in found.out and not found.err
    assert found.out.endswith(f"FAILED: {CHECKS[0].name}\n")
    assert main(["selftest", str(bundle_copy), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == [CHECKS[0].name]


def test_as_pytest(demo_bundle) -> None:
    """device_tests/ run the same checks as `lfm-edge selftest`."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "device_tests",
        "-p",
        "no:cacheprovider",
        "-k",
        "files or golden or arm or sensors",
    ]
    done = subprocess.run(
        [*words, "--bundle", str(demo_bundle), "--profile", "generic"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout or "3 passed" in done.stdout or "4 passed" in done.stdout
    without = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "name the bundle: pytest device_tests --bundle PATH" in without.stdout
