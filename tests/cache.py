"""Bundles that tests start from, kept between runs in build/test-bundles: made anew when a source, the checkpoint or a
package they come from has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "build" / "test-bundles"
_SOURCES = ("profiles", "runtime", "export", "quantize", "demo/checkpoint", "demo/calibration", "tests/conftest.py")
_PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "torch", "transformers", "optimum-onnx")
_KEPT_S = 24 * 3600


def cached_bundle(name: str, make: Callable[[Path], object], target: Path, *sources: str) -> Path:
    """A bundle, or a stick, of one's own at `target`: what `make` writes into the folder it is given, or has written
    before from the same files; `sources`: folders that only it is made of.
    """
    kept = HOME / f"{name}-{_key(*sources)}"
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait for it instead of making it too
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=HOME) as work:
                make(Path(work) / "bundle")
                (Path(work) / "bundle").rename(kept)
    os.utime(kept)
    for old in HOME.iterdir():
        if time.time() - old.stat().st_mtime > _KEPT_S:
            shutil.rmtree(old, ignore_errors=True)
    return Path(shutil.copytree(kept, target))


@cache
def _key(*sources: str) -> str:
    digest = hashlib.sha256()
    for source in (*_SOURCES, *sources):
        place = ROOT / source
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        for file in files:
            if file.suffix not in (".pyc", ".md") and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    digest.update("\n".join(map(_version, _PACKAGES)).encode())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""
