"""What makes an audit invalid."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from auditing import TREE, done, reasons, work
from lfm_audit import audit as audit_module
from lfm_audit.figures import Figure
from lfm_audit.measure.trial import start
from lfm_audit.reading import read_audit
from lfm_audit.result import Audit
from lfm_profiles.sensors import Sensors
from profiles.trees import write

pytestmark = [pytest.mark.process, pytest.mark.newest_python]


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
