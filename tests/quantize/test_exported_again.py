"""A bundle whose checkpoint is exported into it again, with other settings: its variants stay, what was measured goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from lfm_runtime import Model
from lfm_runtime.formats.manifest import Manifest
from lfm_runtime.golden import compare, golden_of

export = pytest.importorskip("lfm_export.export", exc_type=ImportError).export
CHECKPOINT = Path(__file__).resolve().parents[2] / "demo" / "checkpoint"


def change_images(checkpoint: Path) -> None:
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.2] * 3, "max_image_tokens": 32}))


def change_template(checkpoint: Path) -> None:
    path = checkpoint / "chat_template.jinja"
    path.write_text("Be brief. " + path.read_text())


def spell_otherwise(checkpoint: Path) -> None:
    """The same tokenizer, in other bytes, as another release of lfm-edge may write prompt.json."""
    path = checkpoint.parent / "my bundle" / "prompt.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, ""),
        (spell_otherwise, ""),
        (change_images, "other image settings than before: fp16, int8, int4 stay, but not what was measured of them"),
        (change_template, "other tokenizer or chat template than before: fp16, int8, int4 stay"),
    ],
)
def test_what_was_measured_is_of_the_settings(quantized, tmp_path, caplog, change, says) -> None:
    bundle = Path(shutil.copytree(quantized, tmp_path / "my bundle"))
    checkpoint = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
    before = Manifest.of(bundle)
    assert {"int8", "int4"} <= before.quality.keys()
    if change:
        change(checkpoint)
    export(checkpoint, bundle)
    after = Manifest.of(bundle)
    assert after.variants == before.variants
    assert after.quantization == before.quantization
    assert after.quality == ({} if says else before.quality)
    assert after.golden.keys() == before.golden.keys()
    assert (after.golden["int8"] == before.golden["int8"]) == (not says)
    assert says in caplog.text
    assert bool(says) == bool(caplog.text)
    if says:
        assert f"measure it with: lfm-edge quality '{bundle}' --variant fp16 --images PHOTOS" in caplog.text
    for variant in after.variants:
        model = Model.load(bundle, variant=variant, threads=1, profile="generic")
        assert compare(model, golden_of(model.bundle, variant)).problems(variant) == []
