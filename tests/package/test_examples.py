"""The service and the container file, as far as they can be looked at without a system that runs them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).resolve().parents[2] / "package" / "examples"


@pytest.fixture
def unit(tmp_path) -> Path:
    """The systemd unit for cat.jpg, its program replaced by `true`."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    text = (EXAMPLES / "lfm-edge@.service").read_text()
    assert "ExecStart=/opt/lfm-edge/bin/lfm-edge run" in text
    (tmp_path / "lfm-edge@cat.jpg.service").write_text(text.replace("/opt/lfm-edge/bin/lfm-edge", shutil.which("true")))
    return tmp_path / "lfm-edge@cat.jpg.service"


def test_systemd_understands_every_line(unit) -> None:
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "lfm-edge" in line]) == (0, []), done.stderr


def test_it_may_do_little(unit) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", str(unit)], capture_output=True, text=True, check=False
    )
    level = re.search(r"Overall exposure level for .*: ([\d.]+)", done.stdout)
    if level is None:
        pytest.skip("this systemd cannot judge a unit offline")
    assert float(level[1]) <= 1.0


def test_the_container_takes_what_image_makes(stick_once) -> None:
    text = (EXAMPLES / "Containerfile").read_text()
    assert "sh /stick/install.sh --prefix /opt/lfm-edge" in text
    assert (stick_once / "install.sh").exists()
    for flag in ("--read-only", "--network none", "--cap-drop all", "no-new-privileges", "--memory"):
        assert flag in text
