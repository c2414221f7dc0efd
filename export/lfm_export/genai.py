"""A folder for onnxruntime-genai, which it answers from: one variant's graphs, embeddings that put image features in,
its own two JSON files. genai allocates outputs before a step, so the decoder gives the last position's logits alone.

Formats: genai_config.json and the image pipeline of onnxruntime-extensions, as onnxruntime-genai 0.18 reads them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from lfm_runtime.bundle import Bundle
from lfm_runtime.formats.contract import BATCH, DECODER, EMBED_TOKENS, IMAGE_TOKENS, VISION_ENCODER
from lfm_runtime.formats.files import to_json
from lfm_runtime.formats.manifest import Manifest, ModelFacts
from lfm_runtime.formats.writer import replacing
from PIL import Image

from lfm_export.checkpoint.config import CheckpointError
from lfm_export.web import save_alone, without_conv_inputs

VARIANTS = ("int4", "int8", "fp32")
"""Of these the first that a bundle has is taken by default."""
_FILES = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json")
_NAMES = {
    DECODER.stem: "decoder.onnx",
    VISION_ENCODER.stem: "vision_encoder.onnx",
    EMBED_TOKENS.stem: "embeddings.onnx",
}
_PIPELINE = "image_processor.json"
_READ = "text.read."  # slices that decide whose logits are given: decoder.py


def write_genai(folder: Path, output: Path, variant: str | None = None) -> str:
    """Write the folder; returns the variant that is in it.

    Args:
        folder: a bundle of ours.
        output: a folder that is not there yet, or is empty.
        variant: int4, int8 or fp32; by default the first that the bundle has.

    Raises:
        BundleError: not a bundle of ours, without the variant, or the output cannot be written.
        CheckpointError: an output that is there, or graphs that export did not build.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} is there already; choose another output, or remove it")
    bundle, manifest = Bundle.open(folder), Manifest.of(folder)
    name, graphs = bundle.graphs(variant or next((v for v in VARIANTS if v in bundle.variants), None))
    if name not in VARIANTS:
        raise CheckpointError(f"variant {name} is not for onnxruntime-genai here; take one of {', '.join(VARIANTS)}")
    with replacing(output, check=lambda _: None) as new:
        for stem, change in ((DECODER.stem, _with_one_position), (EMBED_TOKENS.stem, _with_images)):
            model = ir.load(graphs[stem])
            change(model, manifest.model)
            save_alone(model, graphs[stem].parent, new / _NAMES[stem])
        vision = ir.load(graphs[VISION_ENCODER.stem])
        save_alone(vision, graphs[VISION_ENCODER.stem].parent, new / _NAMES[VISION_ENCODER.stem])
        for file in _FILES:
            if (bundle.folder / file).exists():
                shutil.copyfile(bundle.folder / file, new / file)
        (new / "tokenizer_config.json").write_text(_tokenizer_config(bundle), encoding="utf-8")
        (new / _PIPELINE).write_text(to_json(_pipeline(bundle), indent=2) + "\n", encoding="utf-8")
        (new / "genai_config.json").write_text(
            to_json(_config(bundle, manifest.model), indent=2) + "\n", encoding="utf-8"
        )
    return name


def _with_one_position(model: ir.Model, facts: ModelFacts) -> None:
    """The decoder gives the logits of the last position whatever the number of tokens, and says so."""
    graph = without_conv_inputs(model).graph
    last = ir.Value(name="genai.last", const_value=ir.tensor(np.array([-1], np.int64)))
    graph.register_initializer(last)
    slices = [n for n in graph if n.op_type == "Slice" and str(n.name).startswith(_READ)]
    if not slices:
        raise CheckpointError(f"{graph.name} is not as lfm-edge export builds it (portable?); export the bundle again")
    for n in slices:
        n.replace_input_with(1, last)
    logits = next(value for value in graph.outputs if value.name == "logits")
    logits.shape = ir.Shape([BATCH, 1, facts.vocabulary])


def _with_images(model: ir.Model, facts: ModelFacts) -> None:
    """The embeddings take image features [image tokens, H] and put them in the image tokens' places, in order."""
    graph = model.graph
    embeds, ids = graph.outputs[0], graph.inputs[0]
    features = ir.Value(
        name="image_features", shape=ir.Shape([IMAGE_TOKENS, facts.hidden]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    graph.inputs.append(features)
    image = ir.Value(name="genai.image", const_value=ir.tensor(np.array(facts.image_token_id, np.int64)))
    graph.register_initializer(image)
    name, embeds.name = str(embeds.name), "genai.text"
    there = ir.node("Equal", [ids, image])
    where = ir.node("NonZero", [there.outputs[0]])
    places = ir.node("Transpose", [where.outputs[0]], {"perm": [1, 0]})
    put = ir.node("ScatterND", [embeds, places.outputs[0], features])
    graph.extend([there, where, places, put])
    put.outputs[0].name, put.outputs[0].shape, put.outputs[0].type = name, embeds.shape, embeds.type
    graph.outputs[0] = put.outputs[0]


def _tokenizer_config(bundle: Bundle) -> str:
    """The checkpoint's, with the class that onnxruntime-extensions knows for tokenizer.json."""
    path = bundle.folder / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return to_json({**said, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n"


def _pipeline(bundle: Bundle) -> dict[str, Any]:
    """How an image becomes pixels: one view, as large as the settings allow; genai does not tile."""
    images = bundle.images
    area = images.cell**2
    resize = {
        "height": images.tile_size,
        "width": images.tile_size,
        "interpolation": "CUBIC" if images.resample == Image.Resampling.BICUBIC else "LINEAR",
        "smart_resize": 1,
        "min_pixels": images.min_image_tokens * area,
        "max_pixels": images.max_image_tokens * area,
        "patch_size": images.encoder_patch_size,
        "merge_size": images.downsample_factor,
    }
    steps: list[tuple[str, dict[str, Any]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        ("Resize", resize),
        ("Rescale", {"rescale_factor": 1 / 255}),
        ("Normalize", {"mean": list(images.image_mean), "std": list(images.image_std)}),
        ("Permute3D", {"dims": [2, 0, 1]}),
        ("PixtralImageSizes", {}),
    ]
    transforms = [
        {"operation": {"name": kind.lower(), "type": kind, **({"attrs": attrs} if attrs else {})}}
        for kind, attrs in steps
    ]
    return {"processor": {"name": "lfm2_vl_image_processor", "transforms": transforms}}


def _config(bundle: Bundle, facts: ModelFacts) -> dict[str, Any]:
    tokens, images = bundle.prompt.vocabulary.tokens, bundle.images
    specials = bundle.prompt.chat.specials
    bos = specials.get("bos_token")
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": _NAMES[DECODER.stem],
        "head_size": facts.head_dim,
        "hidden_size": facts.hidden,
        "num_attention_heads": facts.hidden // facts.head_dim,
        "num_hidden_layers": len(facts.layers),
        "num_key_value_heads": facts.kv_heads,
        "layer_types": list(facts.layers),
        "conv_cache_size": facts.conv_kernel,
        "inputs": {
            "inputs_embeds": "inputs_embeds",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
            "past_conv_names": "past_conv.%d",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
            "present_conv_names": "present_conv.%d",
        },
    }
    vision = {
        "filename": _NAMES[VISION_ENCODER.stem],
        "config_filename": _PIPELINE,
        "patch_size": images.encoder_patch_size,
        "spatial_merge_size": images.downsample_factor,
        "inputs": {
            "pixel_values": "pixel_values",
            "attention_mask": "pixel_attention_mask",
            "image_sizes": "spatial_shapes",
        },
        "outputs": {"image_features": "image_features"},
    }
    embedding = {
        "filename": _NAMES[EMBED_TOKENS.stem],
        "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
        "outputs": {"inputs_embeds": "inputs_embeds"},
    }
    ends = list(bundle.eos)
    model = {
        "type": "lfm2_vl",
        "bos_token_id": tokens.index(bos) if bos in tokens else ends[0],
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": ends[0],
        "context_length": bundle.context_length,
        "vocab_size": facts.vocabulary,
        "decoder": decoder,
        "vision": vision,
        "embedding": embedding,
    }
    search = {"do_sample": False, "max_length": bundle.context_length, "past_present_share_buffer": True}
    return {"model": model, "search": search}
