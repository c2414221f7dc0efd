"""The decode loop for GPUs on a device with memory of its own: see scripts/checks/check_second_device.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # an environment of its own, and a GPU in software
def test_same_text(demo_bundle) -> None:
    pytest.importorskip("onnx")
    script = [sys.executable, str(ROOT / "scripts" / "checks" / "check_second_device.py"), str(demo_bundle)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    if "no Vulkan driver" in done.stderr:
        pytest.skip("no Vulkan driver in software: apt install chromium")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["same_text"]
    assert found["largest_difference"] < 1e-4 * found["largest_logit"]
    assert "Shape" not in "".join(found["left_to_cpu"])
