"""The independent side of the tests: tiny checkpoints of the true architecture and the Hugging Face code that reads
them.

Imported only by tests that have torch and transformers; works with transformers 4.57 and 5.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torchvision_shim  # noqa: F401
import transformers
from lfm_runtime.formats.contract import present_name
from safetensors.torch import save_file
from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig

DEMO = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
VOCABULARY = 896
LAYERS = ["conv", "full_attention", "conv", "full_attention"]

torch.set_num_threads(
    int(os.environ.get("OMP_NUM_THREADS", "2"))
)  # two processes of two threads each would wait for each other
transformers.logging.set_verbosity_error()


def image_processor_class():
    if TRANSFORMERS_5:
        from transformers.models.lfm2_vl.image_processing_lfm2_vl import Lfm2VlImageProcessor

        return Lfm2VlImageProcessor
    from transformers.models.lfm2_vl.image_processing_lfm2_vl_fast import Lfm2VlImageProcessorFast

    class Fixed(Lfm2VlImageProcessorFast):
        """transformers 4.57 takes (columns, rows) of the tile grid for (rows, columns), so that a tile's label names
        the wrong place. transformers 5 has it right; the pixels are the same in both."""

        def crop_image_to_patches(self, *args, **kwargs):
            images, columns, rows = super().crop_image_to_patches(*args, **kwargs)
            return images, rows, columns

    return Fixed


def tiny_model(
    *, text: dict | None = None, vision: dict | None = None, seed: int = 0, **top
) -> Lfm2VlForConditionalGeneration:
    """A random model with sizes that all differ, so that no two dimensions can be confused."""
    text_config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": len(LAYERS),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "block_auto_adjust_ff_dim": False,
        "layer_types": LAYERS,
        "max_position_embeddings": 1024,
        "conv_L_cache": 3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 7,
        **(text or {}),
    }
    if TRANSFORMERS_5:
        text_config.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 50000.0})
    else:
        text_config.setdefault("rope_theta", 50000.0)
    vision_config = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "patch_size": 16,
        "num_patches": 256,
        "vision_use_head": False,
        **(vision or {}),
    }
    config = Lfm2VlConfig(
        vision_config=Siglip2VisionConfig(**vision_config).to_dict(),
        text_config=Lfm2Config(**text_config).to_dict(),
        **{"image_token_id": 396, "projector_hidden_size": 72, "downsample_factor": 2, **top},
    )
    generator = torch.Generator().manual_seed(seed)
    model = Lfm2VlForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.7 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.2
            p.copy_(
                torch.randn(p.shape, generator=generator) * spread + float("norm" in name and name.endswith("weight"))
            )
    model.tie_weights()
    return model


def save_tiny(
    model: Lfm2VlForConditionalGeneration,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    edit_config=None,
    rename=None,
) -> Path:
    """Write hub files. The model's own parameters are rounded to `dtype`, so that it stays the reference."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype).float())
    config = json.loads(model.config.to_json_string(use_diff=False))
    if edit_config:
        edit_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    tied = getattr(model.config, "tie_word_embeddings", True)
    tensors = {
        (rename or (lambda n: n))(name): tensor.to(dtype).contiguous().clone()
        for name, tensor in model.state_dict().items()
        if not (tied and name.startswith("lm_head"))
    }
    write_tensors(tensors, folder, shards)
    copy_text_files(folder)
    return folder


def write_tensors(tensors: dict[str, torch.Tensor], folder: Path, shards: int = 1) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, names in enumerate(np.array_split(sorted(tensors), shards)):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({str(n): tensors[str(n)] for n in names}, folder / file, metadata={"format": "pt"})
        weight_map.update({str(n): file for n in names})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def copy_text_files(folder: Path) -> None:
    """The demo's tokenizer (its vocabulary fits the tiny models) with the ids LFM2 has, and its chat template."""
    import make_random_checkpoint

    make_random_checkpoint.demo_vocabulary(folder, VOCABULARY)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, folder / name)
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 7, "do_sample": False, "repetition_penalty": 1.0})
    )
    shutil.copyfile(DEMO / "preprocessor_config.json", folder / "preprocessor_config.json")


def image_features(
    model: Lfm2VlForConditionalGeneration, pixels: np.ndarray, grids: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Return the features [image tokens of all views, H] that transformers computes."""
    with torch.no_grad():
        found = model.model.get_image_features(torch.tensor(pixels), torch.tensor(grids), torch.tensor(mask))
    found = getattr(found, "pooler_output", found)  # transformers 5 wraps them
    return torch.cat(list(found)).numpy()


def random_views(grids: list[tuple[int, int]], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (pixel_values, spatial_shapes, pixel_attention_mask), padded to the longest view."""
    rng = np.random.default_rng(seed)
    longest = max(rows * columns for rows, columns in grids)
    pixels = np.zeros((len(grids), longest, 768), np.float32)
    mask = np.zeros((len(grids), longest), np.int64)
    for i, (rows, columns) in enumerate(grids):
        pixels[i, : rows * columns] = rng.standard_normal((rows * columns, 768)) * 0.5
        mask[i, : rows * columns] = 1
    return pixels, np.array(grids, np.int64), mask


@functools.cache
def demo_model() -> Lfm2VlForConditionalGeneration:
    """The trained demo checkpoint in transformers."""
    return Lfm2VlForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()


@functools.cache
def demo_processor():
    """Its processor, put together by hand: the loader would ask the hub's class registry."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.lfm2_vl import Lfm2VlProcessor

    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO)
    for name in ("image_token", "image_start_token", "image_end_token", "image_thumbnail"):
        if not hasattr(tokenizer, name):
            setattr(tokenizer, name, tokenizer.init_kwargs[name])
    if not hasattr(tokenizer, "image_token_id"):
        tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    settings = json.loads((DEMO / "preprocessor_config.json").read_text())
    image_processor = image_processor_class()(
        **{k: v for k, v in settings.items() if not k.endswith(("_type", "_class"))}
    )
    return Lfm2VlProcessor(image_processor, tokenizer, chat_template=(DEMO / "chat_template.jinja").read_text())


def decode(session, embeds: np.ndarray, chunks: list[int]) -> np.ndarray:
    """A decoder's logits of the last position after feeding `embeds` in chunks, state carried by hand."""
    past, at = {}, 0
    for i in session.get_inputs():
        if i.name.startswith("past_"):
            shape = [n if isinstance(n, int) else (1 if axis == 0 else 0) for axis, n in enumerate(i.shape)]
            past[i.name] = np.zeros(shape, np.float16 if "16" in i.type else np.float32)
    names = [o.name for o in session.get_outputs()]
    assert names[0] == "logits"
    for n in chunks:
        feeds = {"inputs_embeds": embeds[:, at : at + n], "attention_mask": np.ones((1, at + n), np.int64), **past}
        found = dict(zip(names, session.run(None, feeds), strict=True))
        past = {name: found[present_name(name)] for name in past}
        at += n
    return found["logits"][0, -1]
