"""Folders that other programs wrote, without a manifest, and what a model card's code does with ours."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from lfm_runtime import Model, PromptError
from PIL import Image


@pytest.mark.parametrize("names", ["hub", "older"])
def test_a_hub_folder_runs_without_manifest(demo_bundle, demo_model, drawing, tmp_path, names) -> None:
    """Only the hub's files: no manifest, no prompt.json; also with the names older repositories use, beside
    config.json.
    """
    rename = (
        {"vision_encoder.onnx": "embed_images.onnx", "decoder_model_merged.onnx": "decoder.onnx"}
        if names == "older"
        else {}
    )
    target = tmp_path / "onnx" if names == "hub" else tmp_path
    target.mkdir(exist_ok=True)
    for path in (demo_bundle / "onnx").iterdir():
        shutil.copy(path, target / rename.get(path.name, path.name))
    for path in demo_bundle.iterdir():
        if path.is_file() and path.name not in ("manifest.json", "prompt.json"):
            shutil.copy(path, tmp_path / path.name)
    model = Model.load(tmp_path, threads=1)
    for question in ("What is in this image?", "How many shapes?", "naïve 日本?"):
        wanted, got = demo_model.answer([drawing], question), model.answer([drawing], question)
        assert got.text() == wanted.text()
        assert got.report.prompt_tokens == wanted.report.prompt_tokens


def test_hub_folder_without_a_tokenizer(demo_bundle, tmp_path) -> None:
    shutil.copytree(demo_bundle, tmp_path / "b")
    for name in ("manifest.json", "prompt.json", "tokenizer.json"):
        (tmp_path / "b" / name).unlink()
    with pytest.raises(PromptError, match=r"tokenizer\.json is missing"):
        Model.load(tmp_path / "b")


def test_model_card_snippet(demo_bundle, demo_model, drawing) -> None:
    """The contract as model cards use it: three sessions, zeros for the caches, past_conv of width 3, logits[:, -1]."""
    reference = pytest.importorskip("reference")
    import onnxruntime as ort
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_bundle)
    processor = reference.demo_processor()
    vision, embed, decoder = (
        ort.InferenceSession(str(demo_bundle / "onnx" / f"{stem}.onnx"))
        for stem in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    )
    text = config.text_config
    cache = {}
    for i, kind in enumerate(text.layer_types):
        if kind == "conv":
            cache[f"past_conv.{i}"] = np.zeros((1, text.hidden_size, 3), np.float32)
        else:
            shape = (1, text.num_key_value_heads, 0, text.hidden_size // text.num_attention_heads)
            cache[f"past_key_values.{i}.key"] = np.zeros(shape, np.float32)
            cache[f"past_key_values.{i}.value"] = np.zeros(shape, np.float32)

    question = "What is in this image?"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[[Image.open(drawing).convert("RGB")]], text=[prompt], return_tensors="pt")
    ids = inputs["input_ids"].numpy()
    features = vision.run(
        ["image_features"],
        {
            "pixel_values": inputs["pixel_values"].numpy(),
            "pixel_attention_mask": inputs["pixel_attention_mask"].numpy().astype(np.int64),
            "spatial_shapes": inputs["spatial_shapes"].numpy(),
        },
    )[0]
    mask = np.ones_like(ids)
    embeds = embed.run(None, {"input_ids": ids})[0]
    embeds[ids == config.image_token_id] = features
    said = []
    for _ in range(40):
        logits, *present = decoder.run(None, {"inputs_embeds": embeds, "attention_mask": mask, **cache})
        token = logits[:, -1].argmax(-1, keepdims=True)
        said.append(int(token[0, 0]))
        if said[-1] == text.eos_token_id:
            break
        cache = dict(zip(cache, present, strict=False))  # by position, as the card does
        mask = np.concatenate([mask, np.ones_like(token)], -1)
        embeds = embed.run(None, {"input_ids": token})[0]
    assert (
        processor.tokenizer.decode(said, skip_special_tokens=True)
        == demo_model.answer([drawing], question, temperature=0).text()
    )
