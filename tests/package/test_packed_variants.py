"""Which variants a pack holds, and which of them its device runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from lfm_runtime.commands.cli import main

EVALUATION = Path(__file__).resolve().parents[2] / "demo" / "eval" / "images"


def test_what_a_pack_says_is_what_its_device_runs(demo_bundle, tmp_path, capsys, monkeypatch) -> None:
    """The variant that was named is the one that runs, also where the device's profile lists the prefill variant first;
    where that is not known, it is refused. What an unpacked bundle has of its maker is not lost without a word.
    """
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    for variant in ("int8", "int4"):
        assert main(["quantize", str(bundle), "--variant", variant, "--quiet"]) == 0

    def packed(*words: str) -> str:
        shutil.rmtree(tmp_path / "unpacked", ignore_errors=True)
        assert main(["pack", str(bundle), *words, "-o", str(tmp_path / "cam.tar"), "--force"]) == 0
        assert main(["unpack", str(tmp_path / "cam.tar"), "-o", str(tmp_path / "unpacked")]) == 0
        capsys.readouterr()
        # In a process of its own: what this one holds after other tests would not fit the board.
        words = [sys.executable, "-m", "lfm_runtime", "plan", tmp_path / "unpacked", EVALUATION / "0007.png", "--json"]
        plan = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
        return f"{plan['variant']} {plan['prefill']}"

    monkeypatch.setenv("LFM_EDGE_PROFILE", "pi4")
    assert packed("--variant", "int4", "--prefill", "int8") == "int4 int8"
    assert main(["run", str(tmp_path / "unpacked"), "-p", "x", "--variant", "int4-kv8"]) == 2
    lacking = "it has int4, int8; none can be made of these: take the whole bundle, which has fp32 or fp16\n"
    assert lacking in capsys.readouterr().err, "no advice that ends in the next error"
    monkeypatch.delenv("LFM_EDGE_PROFILE")
    assert packed("--variant", "int8", "--prefill", "int4", "--profile", "pi4") == "int8 int4"
    assert packed("--variant", "fp32", "--prefill", "int8", "--profile", "pi4") == "fp32 int8"
    for variant, prefill, taken in (("fp32", "int8", "int8"), ("int8", "int4", "int4")):
        words = ["pack", str(bundle), "--variant", variant, "--prefill", prefill, "-o", str(tmp_path / "x.tar")]
        assert main(words) == 2
        assert f"runs {taken} unless a profile says otherwise; pack the device's as well" in capsys.readouterr().err
    again = ["pack", str(tmp_path / "unpacked"), "--variant", "fp32", "-o", str(tmp_path / "again.tar")]
    assert main(again) == 0
    assert f"own profile is left out; to pack it: --profile {tmp_path / 'unpacked'}" in capsys.readouterr().out
