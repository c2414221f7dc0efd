"""Reading checkpoints: what is read equals what safetensors and peft give; what is broken is said in one line."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
reference = pytest.importorskip("reference")

from lfm_export.checkpoint.checkpoint import Checkpoint  # noqa: E402
from lfm_export.checkpoint.config import CheckpointError, load_config  # noqa: E402
from lfm_export.checkpoint.tensors import TensorStore, checkpoint_files  # noqa: E402
from lfm_export.export import export  # noqa: E402
from lfm_runtime.commands.cli import main  # noqa: E402
from lfm_runtime.errors import EdgeError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@pytest.fixture
def checkpoint(tmp_path):
    return reference.save_tiny(reference.tiny_model(), tmp_path / "checkpoint")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_safetensors_reads(tmp_path, dtype, shards) -> None:
    folder = reference.save_tiny(reference.tiny_model(), tmp_path, dtype=dtype, shards=shards)
    files = checkpoint_files(folder)
    assert len(files) == shards
    store = TensorStore(files)
    wanted = {name: t for file in files for name, t in load_file(file).items()}
    assert set(store.entries) == set(wanted)
    for name, tensor in wanted.items():
        assert np.array_equal(store.read(name, tuple(tensor.shape)), tensor.float().numpy())


def test_full_size_configs(tmp_path) -> None:
    """Both sizes' shapes, and the widths after auto-adjustment."""
    import make_random_checkpoint

    for size, hidden, width in (("450m", 1024, 4608), ("1.6b", 2048, 8192)):
        (tmp_path / "config.json").write_text(json.dumps(make_random_checkpoint.config(size)))
        text = load_config(tmp_path).text
        assert (text.hidden, text.feed_forward, text.head_dim, text.kv_heads) == (hidden, width, 64, 8)
        assert [i for i, kind in enumerate(text.layers) if kind == "full_attention"] == [2, 5, 8, 10, 12, 14]


def edit(folder, name: str, **changes) -> None:
    raw = json.loads((folder / name).read_text())
    for key, value in changes.items():
        if value is None:
            raw.pop(key)
        else:
            raw[key] = value
    (folder / name).write_text(json.dumps(raw))


def break_tensor(folder, name: str, tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


W1 = "model.language_model.layers.0.feed_forward.w1.weight"
BREAK = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "unknown model_type": (lambda f: edit(f, "config.json", model_type="lfm3_vl"), "model_type is 'lfm3_vl'"),
    "no text_config": (lambda f: edit(f, "config.json", text_config=None), "text_config is missing"),
    "strange activation": (lambda f: edit(f, "config.json", projector_hidden_act="relu"), "projector_hidden_act"),
    "a value of the wrong type": (
        lambda f: edit(f, "config.json", downsample_factor="two"),
        'downsample_factor is "two"; a whole number',
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "another tokenizer": (lambda f: edit(f, "tokenizer.json", normalizer={"type": "NFKC"}), "normalizer NFKC"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    "template that fails": (lambda f: (f / "chat_template.jinja").write_text("{% for %}"), "chat template"),
    "template that drops the text": (
        lambda f: (f / "chat_template.jinja").write_text("{{ messages|length }}"),
        "does not appear as it was given",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors"),
    "truncated weights": (
        lambda f: os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 100),
        "truncated",
    ),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated or damaged"),
    "header is not JSON": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"notjson!"),
        "not JSON",
    ),
    "missing tensor": (lambda f: break_tensor(f, W1, None), "feed_forward.w1.weight is missing"),
    "wrong shape": (
        lambda f: break_tensor(f, W1, torch.zeros(8, 8)),
        "has shape [8, 8], config.json asks for [96, 64]",
    ),
    "wrong dtype": (lambda f: break_tensor(f, W1, torch.zeros(96, 64, dtype=torch.int8)), "quantized by another tool"),
}


@pytest.mark.parametrize("case", BREAK, ids=lambda name: name.replace(" ", "_"))
def test_broken_checkpoint(case, checkpoint, tmp_path, capsys) -> None:
    """Exit code 2, one line, no bundle and nothing beside it."""
    breaking, says = BREAK[case]
    breaking(checkpoint)
    code = main(["export", str(checkpoint), "-o", str(tmp_path / "out" / "bundle"), "--quiet"])
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("lfm-edge: ")
    assert err.count("\n") == 1
    assert says in err
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_missing_shard(tmp_path) -> None:
    folder = reference.save_tiny(reference.tiny_model(), tmp_path / "c", shards=3)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"shard .*model-00002-of-00003.* is missing"):
        Checkpoint(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(CheckpointError, match="outside"):
        Checkpoint(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint(folder)


def test_unknown_rope_is_refused(checkpoint) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    raw["text_config"]["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    (checkpoint / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="yarn"):
        load_config(checkpoint)


# ------------------------------------------------------------------------------------------------------------- adapter

TARGETS = ["q_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "fc1", "linear_1", "linear_2"]


def make_adapter(folder, **options):
    """A peft adapter with random weights on the demo-sized model; returns the merged reference."""
    peft = pytest.importorskip("peft")
    model = reference.tiny_model()
    reference.save_tiny(model, folder / "checkpoint")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": TARGETS, **options})
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder / "adapter")
    return adapted.merge_and_unload().eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"w1": 3}},
        {"target_modules": r".*language_model.*\.(k_proj|w3)"},
        {"target_modules": "all-linear", "exclude_modules": ["conv", "lm_head"]},
        {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["w1", "fc1"]},
    ],
    ids=["plain", "rslora", "patterns", "regex", "all", "layers"],
)
def test_adapter_equals_peft(tmp_path, options) -> None:
    """Logits and features of the export with --adapter against peft's own merge."""
    import onnxruntime as ort

    merged = make_adapter(tmp_path, **options)
    export(tmp_path / "checkpoint", tmp_path / "bundle", adapter=tmp_path / "adapter")
    vision, embed, decoder = (
        ort.InferenceSession(tmp_path / "bundle" / "onnx" / f"{s}.onnx")
        for s in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    )
    pixels, grids, mask = reference.random_views([(8, 6)])
    (features,) = vision.run(None, {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids})
    np.testing.assert_allclose(features, reference.image_features(merged, pixels, grids, mask), atol=1e-4)
    ids = torch.arange(20, 50)[None]
    (embeds,) = embed.run(None, {"input_ids": ids.numpy()})
    zeros = {
        i.name: np.zeros([n if isinstance(n, int) else (1 if a == 0 else 0) for a, n in enumerate(i.shape)], np.float32)
        for i in decoder.get_inputs()
        if i.name.startswith("past_")
    }
    logits = decoder.run(["logits"], {"inputs_embeds": embeds, "attention_mask": np.ones((1, 30), np.int64), **zeros})[
        0
    ]
    with torch.no_grad():
        np.testing.assert_allclose(logits[0, -1], merged(input_ids=ids).logits[0, -1].numpy(), atol=1e-4)


def test_adapter_changes_something(tmp_path) -> None:
    make_adapter(tmp_path)
    plain, adapted = Checkpoint(tmp_path / "checkpoint"), Checkpoint(tmp_path / "checkpoint", tmp_path / "adapter")
    place = "text.layers.0.feed_forward.w1.weight"
    assert np.abs(plain.read(place, 96, 64) - adapted.read(place, 96, 64)).max() > 0.01


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 8}, r"has r = 8 for .*, its tensors have 4; config and tensors are not of one adapter"),
        ({"rank_pattern": {"q_proj": 2}}, r"has r = 2 for .*q_proj, its tensors have 4"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has .*, which is not a regular expression"),
        ({"target_modules": ["v_proj"]}, "which adapter_config.json does not target"),
        ({"exclude_modules": ["w1"]}, r"tensors of .*\.w1, which adapter_config.json does not target"),
        ({"layers_to_transform": [0]}, "which adapter_config.json does not target"),
        ({"target_modules": 5}, "adapter_config.json.*save the adapter again"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_merged(tmp_path, change, says) -> None:
    make_adapter(tmp_path)
    edit(tmp_path / "adapter", "adapter_config.json", **change)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint(tmp_path / "checkpoint", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        (lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor, "all of its lora_B are zero"),
        (lambda name, tensor: None if "v_proj" in name else tensor, "targets v_proj, and .* has no tensor of one"),
    ],
    ids=["untrained", "a target is lost"],
)
def test_an_adapter_of_which_nothing_or_not_all_would_be_merged(tmp_path, lost, says) -> None:
    make_adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {name: lost(name, tensor) for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, file)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint(tmp_path / "checkpoint", tmp_path / "adapter")


def test_an_adapter_may_name_modules_that_the_part_it_was_trained_on_lacks(tmp_path) -> None:
    """Trained on the text model alone, with a list of names for many models."""
    make_adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "language_model" in name}, file)
    edit(tmp_path / "adapter", "adapter_config.json", target_modules=[*TARGETS, "query_key_value"])
    Checkpoint(tmp_path / "checkpoint", tmp_path / "adapter")


def test_an_adapter_that_overflows_is_named(tmp_path) -> None:
    make_adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 1e25 for name, tensor in load_file(file).items()}, file)
    adapted = Checkpoint(tmp_path / "checkpoint", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"adapter: with the adapter, .*w1 has infinite weights"):
        adapted.read("text.layers.0.feed_forward.w1.weight", 96, 64)


def test_adapter_of_another_model(tmp_path) -> None:
    make_adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("layers.0", "layers.77"): t for name, t in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"layers\.77"):
        Checkpoint(tmp_path / "checkpoint", tmp_path / "adapter")
    file.unlink()
    with pytest.raises(EdgeError, match="is missing"):
        Checkpoint(tmp_path / "checkpoint", tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(EdgeError, match=r"adapter does not exist; name a folder that PEFT saved"):
        Checkpoint(tmp_path / "checkpoint", tmp_path / "adapter")


def test_without_image_settings(tmp_path, caplog) -> None:
    """It is exported as Hugging Face cuts images by default, which is said; settings that cannot be are refused before
    the work.
    """
    folder = Path(shutil.copytree(reference.DEMO, tmp_path / "checkpoint"))
    (folder / "preprocessor_config.json").unlink()
    export(folder, tmp_path / "bundle")
    assert "has no preprocessor_config.json, so Hugging Face's default image settings are used" in caplog.text
    (folder / "preprocessor_config.json").write_text('{"max_image_tokens": "many"}')
    with pytest.raises(EdgeError, match="preprocessor_config"):
        export(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()
