"""What the tensors of the family's releases, fine-tunes and conversions say, whatever their config says."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
reference = pytest.importorskip("reference")
pytest.importorskip("onnx_ir")

from changed import MISSING, edit, features_of, logits_of, tensors  # noqa: E402
from lfm_export.checkpoint.checkpoint import Checkpoint  # noqa: E402
from lfm_export.export import export  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


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
