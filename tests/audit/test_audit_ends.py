"""Audits that end before their time: what was measured is kept, and the reason is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from auditing import TREE, done, reasons, work
from lfm_audit import audit as audit_module
from lfm_audit.measure.trial import start
from lfm_profiles.sensors import Sensors
from lfm_runtime.errors import EdgeError
from profiles.trees import write

pytestmark = [pytest.mark.process, pytest.mark.newest_python]


def test_interrupted(demo_bundle, images, tmp_path, processes) -> None:
    processes(4)

    def stop(text: str) -> None:
        if "2 processes measured" in text:
            raise KeyboardInterrupt

    result = done(work(demo_bundle, images), Sensors(write(tmp_path / "tree", TREE)), stop)
    assert result["partial"] and list(result["variants"]) == ["fp32"]
    assert "too few processes" in reasons(result)


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
        "60",
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


def test_trial_errors_are_told(bundle_copy, images, tmp_path, processes) -> None:
    processes(1)
    workload = work(bundle_copy, images)
    (bundle_copy / "onnx" / "vision_encoder.onnx").write_bytes(b"damaged")
    with pytest.raises(EdgeError, match="vision_encoder"):
        done(workload, Sensors(tmp_path))


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
