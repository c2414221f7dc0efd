"""Checkpoints that are damaged, cut or of another family are named for what they are; left-overs in their folders are left."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("reference")
pytest.importorskip("onnx_ir")

from changed import CONV, Q, edit, tensors  # noqa: E402
from lfm_export.checkpoint.checkpoint import Checkpoint  # noqa: E402
from lfm_export.checkpoint.config import CheckpointError  # noqa: E402
from lfm_export.export import export  # noqa: E402
from lfm_runtime.commands.cli import main  # noqa: E402
from lfm_runtime.decode.sampling import GenerationSettings  # noqa: E402
from lfm_runtime.errors import BundleError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def nan(value: float):
    def change(folder: Path) -> None:
        weight = load_file(folder / "model.safetensors")[Q]
        weight[3, 5] = value
        tensors(folder, **{Q: weight})

    return change


def renamed(prefix: str):
    def change(folder: Path) -> None:
        save_file(
            {prefix + n: t for n, t in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors"
        )

    return change


def cut_layers(folder: Path) -> None:
    edit(folder, "config.json", "text_config", "num_hidden_layers", to=2)
    edit(folder, "config.json", "text_config", "layer_types", to=["conv", "full_attention"])


def as_shards(folder: Path) -> None:
    """Split the checkpoint into two files, both of which hold one tensor."""
    found = load_file(folder / "model.safetensors")
    for i in (1, 2):
        save_file({Q: found[Q]} if i == 2 else found, folder / f"model-0000{i}-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {**dict.fromkeys(found, "model-00001-of-00002.safetensors"), Q: "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def only(name: str):
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return change


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 905969664\n"
WRONG = {
    "NaN": (nan(math.nan), [Q, "NaN or infinite"]),
    "infinity": (nan(-math.inf), [Q, "NaN or infinite"]),
    "fewer layers": (cut_layers, ["text_config.num_hidden_layers is 2", "has 4 layers"]),
    "fewer vision layers": (
        lambda f: edit(f, "config.json", "vision_config", "num_hidden_layers", to=1),
        ["vision_config.num_hidden_layers is 1", "has 2 layers"],
    ),
    "half a layer": (
        lambda f: edit(f, "config.json", "text_config", "num_hidden_layers", to=1.5),
        ["num_hidden_layers is 1.5", "whole number"],
    ),
    "true layers": (
        lambda f: edit(f, "config.json", "vision_config", "num_hidden_layers", to=True),
        ["num_hidden_layers is true", "whole number"],
    ),
    "a list of sizes": (
        lambda f: edit(f, "config.json", "text_config", "hidden_size", to=[64]),
        ["text_config.hidden_size is [64]"],
    ),
    "a size of 31 digits": (
        lambda f: edit(f, "config.json", "text_config", "hidden_size", to=10**30),
        ["text_config.hidden_size is 1000", "at most 2147483648"],
    ),
    "layers that are not counted": (
        lambda f: edit(f, "config.json", "text_config", "layer_types", to=["conv"]),
        ["num_hidden_layers is 4", "1 layers"],
    ),
    "norm of nothing": (
        lambda f: edit(f, "config.json", "text_config", "norm_eps", to=0),
        ["norm_eps is 0", "above 0"],
    ),
    "penalty": (
        lambda f: edit(f, "generation_config.json", "repetition_penalty", to={}),
        ["repetition_penalty is {}", "a number"],
    ),
    "end token": (
        lambda f: edit(f, "generation_config.json", "eos_token_id", to={}),
        ["eos_token_id in generation_config.json is {}"],
    ),
    "end token beyond": (
        lambda f: edit(f, "generation_config.json", "eos_token_id", to=[7, 10**6]),
        ["eos_token_id in generation_config.json is [7, 1000000]"],
    ),
    "image_std": (lambda f: edit(f, "preprocessor_config.json", "image_std", to=[0, 0, 0]), ["image_std [0, 0, 0]"]),
    "image_std below 0": (
        lambda f: edit(f, "preprocessor_config.json", "image_std", to=[0.5, -1, 0.5]),
        ["image_std [0.5, -1, 0.5]", "above 0"],
    ),
    "image_mean": (lambda f: edit(f, "preprocessor_config.json", "image_mean", to="x"), ["image_mean is 'x'"]),
    "tolerance": (
        lambda f: edit(f, "preprocessor_config.json", "max_pixels_tolerance", to=[]),
        ["max_pixels_tolerance is []"],
    ),
    "a thousand tiles": (
        lambda f: edit(f, "preprocessor_config.json", "max_tiles", to=10**9),
        ["max_tiles 1000000000"],
    ),
    "other patches": (
        lambda f: edit(f, "preprocessor_config.json", "encoder_patch_size", to=32),
        ["encoder_patch_size 32", "for 16"],
    ),
    "channels": (
        lambda f: edit(f, "config.json", "vision_config", "num_channels", to=10**9),
        ["num_channels 1000000000"],
    ),
    "bitsandbytes": (
        lambda f: edit(f, "config.json", "quantization_config", to={"quant_method": "bitsandbytes"}),
        ["quantized by bitsandbytes", "original"],
    ),
    "fp8": (lambda f: edit(f, "config.json", "quantization_config", to={"quant_method": "fp8"}), ["quantized by fp8"]),
    "MLX": (lambda f: edit(f, "config.json", "quantization", to={"group_size": 64, "bits": 4}), ["quantized by MLX"]),
    "MLX by its tensors": (
        lambda f: tensors(f, **{Q.replace("weight", "scales"): torch.ones(64, 1)}),
        ["quantized by MLX"],
    ),
    "GPTQ by its tensors": (
        lambda f: tensors(f, **{Q.replace("weight", "qweight"): torch.ones(8, 64, dtype=torch.int32)}),
        ["quantized by GPTQ or AWQ"],
    ),
    "bitsandbytes by its tensors": (
        lambda f: tensors(f, **{f"{Q}.absmax": torch.ones(8)}),
        ["quantized by bitsandbytes"],
    ),
    "fp8 by its tensors": (lambda f: tensors(f, **{f"{Q}_scale": torch.ones(1)}), ["quantized by fp8"]),
    "MLX in bfloat16": (
        lambda f: tensors(f, **{CONV: load_file(f / "model.safetensors")[CONV].transpose(1, 2).contiguous()}),
        ["as MLX has them"],
    ),
    "torch.compile": (renamed("_orig_mod."), ["torch.compile", "_orig_mod.save_pretrained"]),
    "PEFT, not merged": (renamed("base_model.model."), ["PEFT", "merge_and_unload"]),
    "DataParallel": (renamed("module."), ["DataParallel"]),
    "a stranger": (
        lambda f: tensors(f, **{"model.extra.weight": torch.ones(3)}),
        ["tensor model.extra.weight is not part of the architecture"],
    ),
    "another spelling beside": (
        lambda f: tensors(f, **{Q.replace("model.language_model.", "language_model."): torch.ones(64, 64)}),
        ["is not part of the architecture"],
    ),
    "one name twice": (as_shards, [Q, "is in both model-00001-of-00002.safetensors and"]),
    "no head": (
        lambda f: [
            edit(f, "config.json", "tie_word_embeddings", to=False),
            edit(f, "config.json", "text_config", "tie_word_embeddings", to=False),
        ],
        ["tie_word_embeddings false", "no lm_head.weight"],
    ),
    "LFS pointer": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        ["model.safetensors is a Git LFS pointer", "git lfs pull"],
    ),
    "LFS pointer of a tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(POINTER),
        ["tokenizer.json is a Git LFS pointer"],
    ),
    "bin": (only("pytorch_model.bin"), ["has pytorch_model.bin, no model.safetensors", "save_pretrained"]),
    "GGUF": (only("model-Q4_0.gguf"), ["model-Q4_0.gguf", "llama.cpp"]),
    "no image token": (
        lambda f: edit(f, "config.json", "image_token_id", to=395),
        ["image token is 395, the tokenizer's <image> is 396"],
    ),
    "a million layers": (
        lambda f: edit(f, "config.json", "vision_config", "num_hidden_layers", to=10**9),
        ["num_hidden_layers is 1000000000", "at most 1000"],
    ),
    "an endless norm": (lambda f: edit(f, "config.json", "text_config", "norm_eps", to=10**400), ["norm_eps is 1000"]),
    "an endless multiplier": (
        lambda f: [edit(f, "config.json", "text_config", "block_ffn_dim_multiplier", to=1e308)],
        ["block_ffn_dim_multiplier is 1e+308"],
    ),
    "an endless factor": (
        lambda f: edit(f, "preprocessor_config.json", "rescale_factor", to=10**400),
        ["rescale_factor"],
    ),
    "an endless penalty": (
        lambda f: edit(f, "generation_config.json", "repetition_penalty", to=10**400),
        ["repetition_penalty"],
    ),
    "one id for two tokens": (
        lambda f: edit(f, "tokenizer.json", "added_tokens", to=[{"id": 7, "content": "<x>", "special": True}]),
        ["id 7 for"],
    ),
    "an id beyond memory": (
        lambda f: edit(f, "tokenizer.json", "added_tokens", to=[{"id": 10**12, "content": "<x>", "special": True}]),
        ["a token id that is not a number"],
    ),
    "rope": (
        lambda f: edit(
            f,
            "config.json",
            "text_config",
            "rope_parameters",
            to={"rope_type": "default", "partial_rotary_factor": 0.5},
        ),
        ["partial_rotary_factor"],
    ),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda name: name.replace(" ", "_"))
def test_what_is_wrong_is_named(tiny, tmp_path, case, capsys) -> None:
    """One line with what, where and what to do; exit code 2; nothing is written."""
    change, says = WRONG[case]
    folder = Path(shutil.copytree(tiny, tmp_path / "c"))
    change(folder)
    assert main(["export", str(folder), "-o", str(tmp_path / "b"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for words in says:
        assert words in said
    assert not (tmp_path / "b").exists()


def test_left_overs_are_left(tiny, tmp_path) -> None:
    """A pooling head of SigLIP2, and buffers that older releases saved."""
    folder = Path(shutil.copytree(tiny, tmp_path / "c"))
    tensors(
        folder,
        **{
            "model.vision_tower.vision_model.head.attention.in_proj_weight": torch.ones(3, 3),
            "model.vision_tower.head.probe": torch.ones(1),
            "model.language_model.rotary_emb.inv_freq": torch.ones(8),
            "model.vision_tower.vision_model.embeddings.position_ids": torch.ones(4),
        },
    )
    export(folder, tmp_path / "b")


def test_no_number_is_no_answer(tiny, tmp_path) -> None:
    """Weights that are numbers and give none: the export fails, JSON holds no NaN, greedy decoding raises as sampling
    does.
    """
    folder = Path(shutil.copytree(tiny, tmp_path / "c"))
    tensors(
        folder,
        **{name: t * 1e30 for name, t in load_file(folder / "model.safetensors").items() if "feed_forward" in name},
    )
    with pytest.raises(BundleError, match="NaN or infinite"):
        export(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    from lfm_runtime.decode.sampling import Sampler, Top

    row = np.full(100, np.nan, np.float32)
    for temperature in (0.0, 0.1):
        with pytest.raises(BundleError, match="NaN or infinite"):
            Sampler(GenerationSettings(temperature=temperature), 100, []).next(row.copy())
        with pytest.raises(BundleError, match="NaN or infinite"):
            Sampler(GenerationSettings(temperature=temperature), 100, []).next(Top(row[:64], np.arange(64), row.copy))
    from lfm_runtime.formats.files import to_json

    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"x": float("nan")})


def test_fp16_holds_no_large_weights(tiny, tmp_path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "c"))
    weight = load_file(folder / "model.safetensors")[Q]
    weight[0, 0] = 70000.0
    tensors(folder, **{Q: weight})
    with pytest.raises(CheckpointError, match="has the value 70000, which overflows fp16"):
        export(folder, tmp_path / "b", dtype="fp16")


def test_the_folder_that_was_meant(tiny, tmp_path, monkeypatch) -> None:
    def said(folder: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(folder)
        return str(caught.value)

    cache = tmp_path / "models--LiquidAI--LFM2-VL-450M"
    for revision in ("aaa", "bbb"):
        shutil.copytree(tiny, cache / "snapshots" / revision)
    assert f"give one of its snapshots: {cache}/snapshots/bbb" in said(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("aaa\n")
    assert f"give one of its snapshots: {cache}/snapshots/aaa" in said(cache)
    assert f"the checkpoint is inside: {cache}/snapshots/aaa" in said(cache / "snapshots")
    assert f"give the folder it lies in: {tiny}" in said(tiny / "model.safetensors")
    shutil.copytree(tiny, tmp_path / "demo" / "checkpoint")
    (tmp_path / "demo" / "bundle").mkdir()  # it has a config.json too, and is no checkpoint
    (tmp_path / "demo" / "bundle" / "config.json").write_text("{}")
    assert f"the checkpoint is inside: {tmp_path}/demo/checkpoint" in said(tmp_path / "demo")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert f"--adapter {adapter}" in said(adapter)
    monkeypatch.chdir(tmp_path)
    assert "hf download LiquidAI/LFM2-VL-450M --local-dir LFM2-VL-450M" in said(Path("LiquidAI/LFM2-VL-450M"))
