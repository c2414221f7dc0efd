"""An answer as model cards of the hub's ONNX repositories show how to make it: their contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def card_answer(bundle: Path, image: Path, question: str) -> str:
    """Three sessions, zeros for the caches, past_conv of width 3, logits[:, -1]; at most 40 tokens."""
    reference = pytest.importorskip("reference")
    import onnxruntime as ort
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(bundle)
    processor = reference.demo_processor()
    vision, embed, decoder = (
        ort.InferenceSession(str(bundle / "onnx" / f"{stem}.onnx"))
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

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[[Image.open(image).convert("RGB")]], text=[prompt], return_tensors="pt")
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
    return str(processor.tokenizer.decode(said, skip_special_tokens=True))
