"""generation_config.json: which tokens end an answer, and how tokens are drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("reference")
pytest.importorskip("onnx_ir")

from changed import MISSING, edit
from lfm_runtime.bundle import end_tokens
from lfm_runtime.decode.sampling import GenerationSettings
from lfm_runtime.errors import BundleError, SettingError
from lfm_runtime.text.spec import compile_on_device

ENDS = [
    ({"generation_config.json": 7, "text": 5, "config.json": 6, "tokenizer": "<|im_start|>"}, (7,)),
    ({"generation_config.json": [7, 2], "text": 5}, (7, 2)),
    ({"generation_config.json": None, "text": 5, "config.json": 6, "tokenizer": "<|im_start|>"}, (5,)),
    ({"text": None, "config.json": [6]}, (6,)),
    ({"config.json": 0}, (0,)),
    ({"tokenizer": "<|im_end|>"}, (7,)),
    ({"tokenizer": {"content": "<|im_end|>"}}, (7,)),
    ({"generation_config.json": []}, BundleError),
    ({}, BundleError),
    ({"tokenizer": "</s>"}, BundleError),
    ({"generation_config.json": True}, BundleError),
    ({"text": -1}, BundleError),
    ({"config.json": 7.0}, BundleError),
]


@pytest.mark.parametrize(("said", "wanted"), ENDS, ids=lambda v: str(v)[:60])
def test_which_token_ends_an_answer(tiny, tmp_path, said, wanted) -> None:
    """generation_config.json, text_config, config.json's top, the tokenizer's eos_token; never a constant."""
    places = {
        "generation_config.json": ("generation_config.json", "eos_token_id"),
        "text": ("config.json", "text_config", "eos_token_id"),
        "config.json": ("config.json", "eos_token_id"),
        "tokenizer": ("tokenizer_config.json", "eos_token"),
    }
    folder = Path(shutil.copytree(tiny, tmp_path / "c"))
    for name, place in places.items():
        edit(folder, *place, to=said.get(name, MISSING))
    prompt = compile_on_device(tiny)
    if wanted is BundleError:
        with pytest.raises(BundleError):
            end_tokens(folder, prompt)
    else:
        assert end_tokens(folder, prompt) == wanted


CARD = GenerationSettings()


def test_the_image_token_ends_no_answer(tiny, tmp_path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "c"))
    image = json.loads((folder / "config.json").read_text())
    edit(
        folder, "generation_config.json", "eos_token_id", to=image.get("image_token_id", image.get("image_token_index"))
    )
    with pytest.raises(BundleError, match="is the image token <image>"):
        end_tokens(folder, compile_on_device(tiny))


SAMPLING = [
    ({}, CARD),
    ({"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}, CARD),
    ({"max_new_tokens": 64}, GenerationSettings(max_new_tokens=64)),
    ({"repetition_penalty": 1.2, "temperature": None}, GenerationSettings(repetition_penalty=1.2)),
    # the 3B's own file
    (
        {"do_sample": True, "temperature": 0.2, "top_k": 50, "repetition_penalty": 1.0},
        GenerationSettings(0.2, 0.0, 50, 1.0, 1.0),
    ),
    ({"temperature": 0.7, "top_p": 0.9}, GenerationSettings(0.7, 0.0, 50, 0.9, 1.0)),
    ({"do_sample": True}, GenerationSettings(1.0, 0.0, 50, 1.0, 1.0)),
    ({"do_sample": False}, GenerationSettings(0.0, 0.0, 50, 1.0, 1.0)),
    ({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1}, GenerationSettings(0.0, 0.0, 50, 1.0, 1.1)),
    ({"min_p": 0.15, "temperature": 0.1, "top_k": 0}, GenerationSettings(0.1, 0.15, 0, 1.0, 1.0)),
    ({"temperature": 1}, GenerationSettings(1.0, 0.0, 50, 1.0, 1.0)),
]


@pytest.mark.parametrize(("raw", "wanted"), SAMPLING, ids=lambda v: str(v)[:60])
def test_sampling_is_the_files_where_it_says_anything(raw, wanted) -> None:
    """What it leaves out is then transformers' default; the model card's values where it says nothing."""
    assert GenerationSettings.from_config(raw) == wanted


@pytest.mark.parametrize(
    "raw",
    [
        {"temperature": "hot"},
        {"top_k": 1.5},
        {"top_k": True},
        {"do_sample": 1},
        {"repetition_penalty": {}},
        {"max_new_tokens": -1},
        {"top_p": 0},
        {"min_p": float("nan")},
    ],
    ids=str,
)
def test_impossible_sampling_is_named(raw) -> None:
    with pytest.raises(SettingError, match=next(iter(raw))):
        GenerationSettings.from_config(raw)
