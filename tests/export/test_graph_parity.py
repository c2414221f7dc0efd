"""Exported graphs against transformers: every config spelling, both projectors, batches of different grids, cached
decoding.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
reference = pytest.importorskip("reference")
decode = reference.decode

from lfm_export.export import export  # noqa: E402

pytestmark = pytest.mark.transformers5

GRIDS = [(8, 12), (4, 6), (32, 32), (2, 64), (20, 18), (2, 2)]


def spell_early_hub(config: dict) -> None:
    """The hub's first files: dashes in model_type, attention layers by index, block_ names, settings at the top."""
    text = config["text_config"]
    config["model_type"] = "lfm2-vl"
    config["image_token_index"] = config.pop("image_token_id")
    text["full_attn_idxs"] = [i for i, kind in enumerate(text.pop("layer_types")) if kind == "full_attention"]
    text["theta"] = text.pop("rope_theta", None) or text.pop("rope_parameters")["rope_theta"]
    text.pop("rope_parameters", None)
    text["block_ff_dim"], text["intermediate_size"] = text["intermediate_size"], 1
    text["tie_embedding"] = text.pop("tie_word_embeddings", True)


def spell_rope_parameters(config: dict) -> None:
    text = config["text_config"]
    theta = text.pop("rope_theta", None) or text["rope_parameters"]["rope_theta"]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    config["model_type"] = "lfm2_vl"


def name_as_transformers_5(name: str) -> str:
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def name_as_transformers_4(name: str) -> str:
    return name if "vision_tower.vision_model." in name else name.replace("vision_tower.", "vision_tower.vision_model.")


CASES = {
    "plain": {},
    "early hub spelling": {"edit": spell_early_hub, "rename": name_as_transformers_4},
    "transformers 5 spelling": {"edit": spell_rope_parameters, "rename": name_as_transformers_5},
    "auto-adjusted FF": {"text": {"block_auto_adjust_ff_dim": True, "intermediate_size": 300, "block_multiple_of": 32}},
    "biased convolution": {"text": {"conv_bias": True}},
    "kernel 4": {"text": {"conv_L_cache": 4}},
    "vision head present, 9 wide heads": {
        "vision": {"vision_use_head": True, "hidden_size": 36, "intermediate_size": 43}
    },
    "small table": {"vision": {"num_patches": 64}},
    "no projector bias": {"top": {"projector_bias": False}},
    "no projector norm": {"top": {"projector_use_layernorm": False}},
    "untied head": {"text": {"tie_word_embeddings": False}, "top": {"tie_word_embeddings": False}},
    "untied head, as transformers 5 writes it": {
        "text": {"tie_word_embeddings": False},
        "top": {"tie_word_embeddings": False},
        "edit": lambda config: config["text_config"].update(tie_word_embeddings=True),
    },
    "bfloat16 in three shards": {"dtype": torch.bfloat16, "shards": 3},
    "float16": {"dtype": torch.float16},
    "starts with attention": {"text": {"layer_types": ["full_attention", "conv", "conv", "full_attention"]}},
}


def build(case: dict, folder):
    """Return (reference model, sessions by stem)."""
    top = dict(case.get("top", {}))
    if "projector_use_layernorm" in top and not reference.TRANSFORMERS_5:
        top.pop("projector_use_layernorm")
    model = reference.tiny_model(text=case.get("text"), vision=case.get("vision"), **top)
    edit = case.get("edit")
    if "projector_use_layernorm" in case.get("top", {}) and not reference.TRANSFORMERS_5:
        model.model.multi_modal_projector.layer_norm = torch.nn.Identity()  # what transformers 5 leaves out
        edit = lambda config: config.update(projector_use_layernorm=False)  # noqa: E731
    reference.save_tiny(
        model,
        folder / "checkpoint",
        dtype=case.get("dtype", torch.float32),
        shards=case.get("shards", 1),
        edit_config=edit,
        rename=case.get("rename"),
    )
    export(folder / "checkpoint", folder / "bundle")
    return model, {
        stem: ort.InferenceSession(folder / "bundle" / "onnx" / f"{stem}.onnx")
        for stem in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    }


SPELLINGS = (
    "plain",
    "early hub spelling",
    "transformers 5 spelling",
    "untied head",
    "untied head, as transformers 5 writes it",
    "bfloat16 in three shards",
)
"""Also with transformers 4.57; the others differ in shape, which both compute alike."""


def cases():
    for name in CASES:
        marks = () if name in SPELLINGS else pytest.mark.transformers5_alone
        yield pytest.param(name, marks=marks, id=name.replace(" ", "_"))


@pytest.fixture(scope="module", params=cases())
def pair(request, tmp_path_factory):
    return build(CASES[request.param], tmp_path_factory.mktemp("case"))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_vision_features(pair) -> None:
    model, sessions = pair
    pixels, grids, mask = reference.random_views(GRIDS)
    wanted = reference.image_features(model, pixels, grids, mask)
    feeds = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids}
    (padded,) = sessions["vision_encoder"].run(None, feeds)
    alone = []
    for i, (rows, columns) in enumerate(GRIDS):
        n = rows * columns
        one = {
            "pixel_values": pixels[i : i + 1, :n],
            "pixel_attention_mask": mask[i : i + 1, :n],
            "spatial_shapes": grids[i : i + 1],
        }
        alone.append(sessions["vision_encoder"].run(None, one)[0])
    for got in (padded, np.concatenate(alone)):
        assert got.shape == wanted.shape
        assert cosine(got, wanted).min() >= 0.99999
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_logits_and_cached_decoding(pair) -> None:
    model, sessions = pair
    ids = torch.tensor(np.random.default_rng(1).integers(8, 390, (1, 48)))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits.numpy()[0]
    (embeds,) = sessions["embed_tokens"].run(None, {"input_ids": ids.numpy()})
    decoder = sessions["decoder_model_merged"]
    for length in (1, 2, 3, 48):
        np.testing.assert_allclose(decode(decoder, embeds[:, :length], [length]), wanted[length - 1], atol=1e-4)
    for chunks in ([40] + [1] * 8, [1] * 48, [20, 20, 8], [1, 2, 3, 4, 38]):
        np.testing.assert_allclose(decode(decoder, embeds, chunks), wanted[-1], atol=5e-3)


def test_demo_model_parity(demo_bundle) -> None:
    """The trained demo model gives the features and logits that transformers gives."""
    model = reference.demo_model()
    vision, embed, decoder = (
        ort.InferenceSession(demo_bundle / "onnx" / f"{s}.onnx")
        for s in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    )
    pixels, grids, mask = reference.random_views([(8, 8), (16, 16), (10, 14)])
    wanted = reference.image_features(model, pixels, grids, mask)
    (got,) = vision.run(None, {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids})
    assert cosine(got, wanted).min() >= 0.99999
    ids = torch.tensor(np.random.default_rng(2).integers(0, 490, (1, 60)))
    ids[ids == model.config.image_token_id] = 9
    with torch.no_grad():
        logits = model(input_ids=ids).logits.numpy()[0, -1]
    (embeds,) = embed.run(None, {"input_ids": ids.numpy()})
    np.testing.assert_allclose(decode(decoder, embeds, [60]), logits, atol=1e-4)


@pytest.mark.parametrize("seed", range(50))
def test_greedy_text_identical(seed, demo_model, monkeypatch) -> None:
    """50 prompts about drawn pictures, some large enough to be tiled: ids from transformers' processor and generate."""
    import random

    import demo_data

    rng = random.Random(seed)
    size = (rng.choice((416, 512, 640)), rng.choice((416, 480))) if seed % 10 == 0 else demo_data.random_size(rng)
    sample = demo_data.draw_sample(rng, rng.choice(("shapes", "text")), *size)
    question = rng.choice([sample.questions[0][1], "Tell me more, please.", "How many?", "Größe? 大きさ 🙂"])
    processor, model = reference.demo_processor(), reference.demo_model()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[[sample.image]], text=[prompt], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    penalty = 1.3 if seed % 3 == 0 else 1.0
    with torch.no_grad():  # eos is ignored on both sides, so that 64 tokens are compared
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False, repetition_penalty=penalty, eos_token_id=-1)
    new = out[0, inputs["input_ids"].shape[1] :]
    assert len(new) == 64
    wanted = processor.tokenizer.decode(new, skip_special_tokens=True)
    monkeypatch.setitem(demo_model.bundle.__dict__, "eos", ())
    answer = demo_model.answer([sample.image], question, temperature=0, max_new_tokens=64, repetition_penalty=penalty)
    assert answer.text() == wanted
    assert answer.report.new_tokens == 64
    assert answer.report.prompt_tokens == inputs["input_ids"].shape[1]
    assert answer.report.image_tokens == int((inputs["input_ids"] == model.config.image_token_id).sum())
