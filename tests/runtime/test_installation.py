"""What is said about a missing package, in a clone and beside a wheel; against pip's own reading of the metadata."""

from __future__ import annotations

from importlib.metadata import distribution

import pytest
from lfm_runtime import installation
from lfm_runtime.installation import extra_for, install_advice, requirements


@pytest.mark.parametrize(
    ("module", "likely", "extra"),
    [
        ("onnx_ir", "export", "export"),
        ("onnx", "quantize", "quantize"),
        ("onnx", "", "quantize"),
        ("jinja2", "export", "export"),
        ("jinja2.sandbox", "audit", "report"),
        ("matplotlib.figure", "quantize", "report"),
        ("cyclonedx.model", "package", "package"),
        ("PIL", "runtime", None),
    ],
)
def test_the_extra_of_a_module(module, likely, extra) -> None:
    assert extra_for(module, likely) == extra


def test_in_a_clone_and_beside_a_wheel(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(installation, "_clone", lambda: tmp_path)
    assert install_advice("export").endswith(f"-m pip install -e '{tmp_path}[export]'")
    monkeypatch.setattr(installation, "_clone", lambda: None)
    assert "lfm-edge[" not in install_advice("export"), "the name on the index is not ours"
    assert "'onnx-ir>=" in install_advice("export")
    both = install_advice("export,package")
    assert "'onnx-ir>=" in both
    assert "'packaging>=" in both


def test_what_a_stick_installed_gets_another_stick(monkeypatch, tmp_path) -> None:
    """There is no pip in it, and a board may have no network."""
    version = tmp_path / "versions" / "demo-0123456789ab"
    (version / "venv").mkdir(parents=True)
    monkeypatch.setattr(installation.sys, "prefix", str(version / "venv"))
    assert "pip install" in install_advice("video")
    (version / "complete").touch()
    assert install_advice("video,mqtt") == "lfm-edge stick BUNDLE … -o STICK --extra video --extra mqtt"
    assert install_advice("report") == "pip install -e '.[report]' in a clone, on another machine"


def test_requirements_are_the_metadata(monkeypatch) -> None:
    packaging = pytest.importorskip("packaging.requirements")
    parsed = [packaging.Requirement(line) for line in distribution("lfm-edge").requires]
    for extra in ("export", "quantize", "report", "package"):
        wanted = {
            str(r.specifier)
            for r in parsed
            if r.marker and r.marker.evaluate({"extra": extra, "python_version": "3.12"})
        }
        found = {str(packaging.Requirement(r).specifier) for r in requirements(extra)}
        assert found <= wanted and len(found) > 0
