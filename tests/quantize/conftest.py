"""Quantized demo bundles, made once for all tests here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cache import cached_bundle

pytest.importorskip("onnx_ir")

ROOT = Path(__file__).resolve().parents[2]
CALIBRATION = ROOT / "demo" / "calibration"


@pytest.fixture(scope="session")
def questions():
    """(to calibrate with, to judge with): pictures that are not in both."""
    from lfm_quantize.calibrate.samples import read_questions

    return (
        read_questions(None, CALIBRATION / "calibration.jsonl")[0],
        read_questions(None, ROOT / "demo" / "eval" / "eval.jsonl")[0],
    )


def _first_images(folder: Path, count: int) -> Path:
    """A calibration file of the first `count` pictures, one question each; returns its folder."""
    chosen, seen = [], set()
    for line in (CALIBRATION / "calibration.jsonl").read_text().splitlines():
        image = json.loads(line)["image"]
        if image not in seen and len(seen) < count:
            seen.add(image)
            chosen.append(line)
    # Shapes come first in the file, texts last: half of each.
    texts = [line for line in (CALIBRATION / "calibration.jsonl").read_text().splitlines() if '"read"' in line]
    chosen = chosen[: count // 2] + texts[: count - count // 2]
    for name in {json.loads(line)["image"] for line in chosen}:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(CALIBRATION / name, folder / name)
    (folder / "calibration.jsonl").write_text("\n".join(chosen) + "\n")
    return folder


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Path:
    """Twelve pictures, for tests that are about something else than quality."""
    return _first_images(tmp_path_factory.mktemp("few"), 12)


@pytest.fixture(scope="session")
def quantized(demo_bundle, tmp_path_factory) -> Path:
    """The demo bundle with fp16, int8 and int4, calibrated with 64 pictures."""
    from lfm_quantize.quantize import quantize
    from lfm_quantize.settings import Settings

    def make(folder: Path) -> None:
        shutil.copytree(demo_bundle, folder)
        images = _first_images(tmp_path_factory.mktemp("calibration"), 64)
        for variant in ("fp16", "int8", "int4"):
            quantize(folder, Settings(variant, (images / "images",), images / "calibration.jsonl", threads=2))

    return cached_bundle("quantized", make, tmp_path_factory.mktemp("quantized") / "bundle")
