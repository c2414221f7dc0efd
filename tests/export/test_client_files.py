"""What other programs look for in a bundle's JSON files, and that it changes nothing for those who knew it before."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from lfm_export.export import export
from lfm_runtime.bundle import Bundle
from lfm_runtime.errors import EdgeError
from lfm_runtime.images.layout import ImageSettings

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "demo" / "checkpoint"
REAL = Path(os.environ.get("LFM_EDGE_REAL_FILES", ROOT / "none"))


def exported(checkpoint: Path, tmp_path: Path) -> Path:
    export(checkpoint, tmp_path / "bundle")
    return tmp_path / "bundle"


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def with_image_settings(tmp_path: Path, preprocessor: dict | None, processor: dict | None = None) -> Path:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
    for name, value in (("preprocessor_config.json", preprocessor), ("processor_config.json", processor)):
        (folder / name).unlink(missing_ok=True)
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    return folder


def test_half_a_surrogate_pair(tmp_path) -> None:
    """JSON of Python may hold it, UTF-8 cannot: where nothing reads it, it is copied with its escape; else it is named."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({**read(folder, name), "note": "x\ud800"}))
    bundle = exported(folder, tmp_path)
    assert read(bundle, "config.json")["note"] == "x\ud800"
    assert read(bundle, "tokenizer_config.json")["note"] == "x\ud800"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**read(folder, "tokenizer_config.json"), "bos_token": "\ud800"})
    )
    with pytest.raises(EdgeError, match="half a surrogate pair"):
        export(folder, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_bundle_of_the_demo(demo_bundle) -> None:
    images = read(demo_bundle, "preprocessor_config.json")
    assert images["processor_class"] == "Lfm2VlProcessor"
    assert not {"do_resize", "size"} & images.keys()
    assert (
        read(demo_bundle, "tokenizer_config.json")["chat_template"] == (CHECKPOINT / "chat_template.jinja").read_text()
    )
    told = read(demo_bundle, "config.json")["transformers.js_config"]
    assert told["dtype"] == dict.fromkeys(("vision_encoder", "embed_tokens", "decoder_model_merged"), "fp32")
    assert set(told["use_external_data_format"]) == {p.name for p in (demo_bundle / "onnx").glob("*.onnx")}


SAID = {
    "image_processor_type": "Lfm2VlImageProcessorFast",
    "tile_size": 256,
    "max_image_tokens": 64,
    "min_image_tokens": 16,
}


@pytest.mark.parametrize(
    ("preprocessor", "processor"),
    [
        ({**SAID, "do_resize": True, "size": {"height": 512, "width": 512}}, None),
        (
            None,
            {"image_processor": {**SAID, "size": {"height": 512, "width": 512}}, "processor_class": "Lfm2VlProcessor"},
        ),
        (
            {"image_processor_type": "Siglip2ImageProcessor", "auto_map": {}},
            {k: v for k, v in SAID.items() if "type" not in k},
        ),
    ],
)
def test_image_settings_are_in_one_file(tmp_path, preprocessor, processor) -> None:
    """Wherever a release has them, the preprocessor's file says all of them afterwards."""
    checkpoint = with_image_settings(tmp_path, preprocessor, processor)
    bundle = exported(checkpoint, tmp_path)
    found = read(bundle, "preprocessor_config.json")
    assert {**found, **SAID} == found
    assert not {"do_resize", "size", "auto_map"} & found.keys()
    assert Bundle.open(bundle).images == ImageSettings.from_folder(checkpoint)


@pytest.mark.transformers5
@pytest.mark.parametrize("size", [(30, 40), (256, 256), (511, 300), (700, 500), (1000, 260)])
def test_transformers_reads_both_alike(demo_bundle, size) -> None:
    """AutoProcessor of releases 4.57 and 5, of the bundle as of the checkpoint: the same prompt and tensors."""
    pytest.importorskip("reference")
    from PIL import Image
    from transformers import AutoProcessor

    image = Image.effect_noise(size, 80).convert("RGB")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    made = []
    for folder in (CHECKPOINT, demo_bundle):
        processor = AutoProcessor.from_pretrained(folder)
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        made.append(processor(images=[[image]], text=[text], return_tensors="pt"))
    assert made[0].keys() == made[1].keys()
    for name in made[0]:
        assert (made[0][name] == made[1][name]).all(), name
