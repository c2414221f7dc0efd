"""LoRA adapters as PEFT writes them: merged, or named for what makes them more than a sum."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("reference")
pytest.importorskip("onnx_ir")

from changed import TABLE, Q, tensors  # noqa: E402
from lfm_export.checkpoint.checkpoint import Checkpoint  # noqa: E402
from lfm_export.checkpoint.config import CheckpointError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

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
