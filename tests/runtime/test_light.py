"""What the runtime promises to those who install it on a device: nothing heavy is loaded, help is instant, no telemetry."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FORBIDDEN = {
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "tokenizers",
    "jinja2",
    "lfm_export",
    "lfm_quantize",
    "requests",
    "huggingface_hub",
}


def loaded_by(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", code + "\nimport sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(out.splitlines()[-1].split())


def test_runtime_stays_light() -> None:
    assert not FORBIDDEN & loaded_by(
        "import lfm_runtime, lfm_runtime.commands.cli, lfm_runtime.commands.run, lfm_runtime.commands.chat, lfm_profiles"
    )


def test_command_line_stays_light(demo_bundle, drawing) -> None:
    """A whole `run`, to the end of its answer, imports no forbidden package."""
    code = f"from lfm_runtime.commands.cli import main\nassert main(['run', {str(demo_bundle)!r}, {str(drawing)!r}, '-p', 'x', '--json']) == 0"
    assert not FORBIDDEN & loaded_by(code)


def test_help_is_instant() -> None:
    """--help loads no onnxruntime and no numpy."""
    code = "from lfm_runtime.commands.cli import main\nimport contextlib\nwith contextlib.suppress(SystemExit):\n    main(['run', '--help'])"
    assert not {"onnxruntime", "numpy", "PIL"} & loaded_by(code)


@pytest.mark.parametrize(("given", "wanted"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_unless_the_user_says_otherwise(given, wanted) -> None:
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    if given:
        env["ORT_DISABLE_TELEMETRY"] = given
    code = """
import os, sys
class Watch:  # sees the variable at the moment onnxruntime is first asked for
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Watch())
from lfm_runtime import Model
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.split() == [wanted]
