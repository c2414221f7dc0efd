"""The units and the container file, as far as they can be looked at without a system that runs them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from lfm_runtime.commands.cli import every_command

pytestmark = pytest.mark.process
EXAMPLES = Path(__file__).resolve().parents[2] / "serve" / "examples"
PROGRAM = "/opt/lfm-edge/bin/lfm-edge"


@pytest.fixture
def units(tmp_path) -> list[str]:
    """Both units, their program replaced by `true`."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    for name in ("lfm-edge-serve.service", "lfm-edge-serve.socket"):
        text = (EXAMPLES / name).read_text()
        (tmp_path / name).write_text(text.replace(PROGRAM, str(shutil.which("true"))))
    return [str(tmp_path / "lfm-edge-serve.service"), str(tmp_path / "lfm-edge-serve.socket")]


def test_systemd_understands_every_line(units) -> None:
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "lfm-edge" in line]) == (0, []), done.stderr


def test_it_may_do_little(units) -> None:
    words = ["systemd-analyze", "security", "--offline=true", units[0]]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    level = re.search(r"Overall exposure level for .*: ([\d.]+)", done.stdout)
    if level is None:
        pytest.skip("this systemd cannot judge a unit offline")
    assert float(level[1]) <= 1.5


def test_the_commands_in_them_are_ours() -> None:
    """What the unit and the container start is parsed as the command line would."""
    pytest.importorskip("starlette")
    words = re.search(r"^ExecStart=(.*)$", (EXAMPLES / "lfm-edge-serve.service").read_text(), re.MULTILINE)[1].split()
    container = (EXAMPLES / "Containerfile").read_text()
    entry, arguments = (
        re.findall(r'"([^"]*)"', line) for line in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", container, re.MULTILINE)
    )
    for line in (words, [*entry, *arguments]):
        assert line[0].endswith("/bin/lfm-edge")
        assert every_command().parse_args(line[1:]).api_key_file
    for flag in ("--read-only", "--cap-drop all", "no-new-privileges", "--memory"):
        assert flag in container
