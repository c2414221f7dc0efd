"""Graphs of standard ONNX operators alone, traced by Hugging Face Optimum: for engines that do not know onnxruntime's
own operators.

A second way to the same contract, made from transformers' layers and not from builder.py, so that each can be tested
against the other.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from huggingface_hub import snapshot_download
from lfm_runtime.formats.contract import (
    BATCH,
    DECODER,
    EMBED_TOKENS,
    IMAGE_TOKENS,
    PAST,
    PATCHES,
    TOKENS,
    TOTAL,
    VISION_ENCODER,
    past_names,
    present_name,
)
from optimum.exporters.onnx import OnnxConfig, export_models, onnx_export_from_model
from optimum.utils import NormalizedConfig
from torch import nn
from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

from lfm_export.builder import Progress
from lfm_export.checkpoint.checkpoint import Checkpoint, copy_hub_files
from lfm_export.checkpoint.config import CheckpointError
from lfm_export.portable.torch_model import load_model
from lfm_export.portable.wrappers import Decoder, EmbedTokens, VisionEncoder

OPSET = 18  # the lowest that Optimum recommends; LayerNormalization is in it, newer engines read it
Axes = dict[str, dict[int, str]]


def write_portable(folder: Path, checkpoint: Checkpoint, progress: Progress) -> list[Path]:
    """Trace a checkpoint and write onnx/STEM.onnx with its weights beside it. Returns the graphs' files.

    Raises:
        CheckpointError: the checkpoint cannot be read, or a module cannot be traced; it is named, with the cause.
    """
    model = load_model(checkpoint)
    modules, configs = submodels(model), onnx_configs(model.config)
    written = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for stem, module in modules.items():
            with _quiet(), _named(stem):
                export_models({stem: (module, configs[stem])}, Path(work), opset=OPSET, output_names=[f"{stem}.onnx"])
            written.append(_with_data_file(Path(work) / f"{stem}.onnx", folder / "onnx" / f"{stem}.onnx"))
            progress(stem, sum(path.stat().st_size for path in folder.glob(f"onnx/{stem}.onnx*")))
    return written


def export_with_optimum(name: str, output: Path) -> None:
    """As Optimum's own export goes, its check of the graphs included, of a model that is loaded here: transformers 4.57
    does not know some spellings of tensor names, nor a projector without norm, and goes on with random weights.

    Args:
        name: a checkpoint's folder, or a model of the hub.
        output: the folder to write into.

    Raises:
        CheckpointError: the checkpoint cannot be had or read, or the output is no folder.
    """
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is not a folder; choose another output")
    folder = Path(name) if Path(name).is_dir() else _from_hub(name)
    model = load_model(Checkpoint(folder))
    onnx_export_from_model(
        model,
        output,
        opset=OPSET,
        task="image-text-to-text",
        custom_onnx_configs=onnx_configs(model.config),
        fn_get_submodels=submodels,
    )
    copy_hub_files(folder, output)


def submodels(model: Lfm2VlForConditionalGeneration) -> dict[str, nn.Module]:
    """What is traced, by stem: Optimum's `fn_get_submodels`. Attention is written out: a trace sees nothing of fused
    kernels.
    """
    model.set_attn_implementation("eager")
    return {
        VISION_ENCODER.stem: VisionEncoder(model),
        EMBED_TOKENS.stem: EmbedTokens(model),
        DECODER.stem: Decoder(model),
    }


def onnx_configs(config: Lfm2VlConfig) -> dict[str, OnnxConfig]:
    """Names, dynamic axes and example inputs of each, by stem: Optimum's `custom_onnx_configs`."""
    return {
        VISION_ENCODER.stem: VisionEncoderConfig(config),
        EMBED_TOKENS.stem: EmbedTokensConfig(config),
        DECODER.stem: DecoderConfig(config),
    }


class _Config(OnnxConfig):  # type: ignore[misc]
    """Example inputs are given whole: they hang together, which generators per input cannot know."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    ATOL_FOR_VALIDATION = 1e-3
    DEFAULT_ONNX_OPSET = OPSET

    def __init__(self, config: Lfm2VlConfig, task: str = "image-text-to-text", **kwargs: Any) -> None:
        super().__init__(config, task=task, **kwargs)

    @property
    def values_override(self) -> None:
        """None: Optimum changes nothing of the checkpoint's configuration."""

    def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> dict[str, Any]:
        """As torch tensors, or as arrays for a check in onnxruntime."""
        generator = torch.Generator().manual_seed(0)
        made = self.example(lambda *shape: torch.randn(shape, generator=generator))
        return made if framework == "pt" else {name: _numpy(value) for name, value in made.items()}

    @abstractmethod
    def example(self, random: Callable[..., torch.Tensor]) -> dict[str, Any]:
        """Inputs by the wrapper's parameters; `random` gives a float tensor of a shape."""


class VisionEncoderConfig(_Config):
    """Vision encoder; the example is two views of different grids, one of them padded."""

    @property
    def inputs(self) -> Axes:
        """Input names and dynamic axes, as in lfm_runtime.formats.contract."""
        return {
            "pixel_values": {0: BATCH, 1: PATCHES},
            "pixel_attention_mask": {0: BATCH, 1: PATCHES},
            "spatial_shapes": {0: BATCH},
        }

    @property
    def outputs(self) -> Axes:
        """Output names and dynamic axes, as in lfm_runtime.formats.contract."""
        return {"image_features": {0: IMAGE_TOKENS}}

    def example(self, random: Callable[..., torch.Tensor]) -> dict[str, Any]:
        """Of 4 × 10 and 6 × 2 cells of the projector."""
        factor, vision = self._config.downsample_factor, self._config.vision_config
        grids = torch.tensor([[4 * factor, 10 * factor], [6 * factor, 2 * factor]])
        sizes = grids.prod(1)
        patches = int(sizes.max())
        mask = (torch.arange(patches)[None] < sizes[:, None]).long()
        pixels = random(2, patches, vision.num_channels * vision.patch_size**2)
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids}


class EmbedTokensConfig(_Config):
    """Token embeddings; the example is three sequences of five ids."""

    @property
    def inputs(self) -> Axes:
        """Input names and dynamic axes, as in lfm_runtime.formats.contract."""
        return {"input_ids": {0: BATCH, 1: TOKENS}}

    @property
    def outputs(self) -> Axes:
        """Output names and dynamic axes, as in lfm_runtime.formats.contract."""
        return {"inputs_embeds": {0: BATCH, 1: TOKENS}}

    def example(self, random: Callable[..., torch.Tensor]) -> dict[str, Any]:
        """Return input_ids of three sequences of five tokens."""
        return {"input_ids": (random(3, 5).abs() * 10).long()}


class DecoderConfig(_Config):
    """Three sequences: five tokens after seven. The wrapper's parameters are lists, and named apart here."""

    @property
    def _past(self) -> dict[str, str]:
        """The contract's name of each state → what it is called as a part of the wrapper's parameter."""
        names = past_names(self._config.text_config.layer_types)
        convs = [name for name in names if name.startswith("past_conv.")]
        return {name: name for name in convs} | {
            name: name.replace("past_key_values.", "past_attention.") for name in names if name not in convs
        }

    @property
    def torch_to_onnx_input_map(self) -> dict[str, str]:
        """Names of the wrapper's inputs, mapped to the graph's."""
        return {part: name for name, part in self._past.items()}

    @property
    def inputs(self) -> Axes:
        """Input names as the wrapper has them, with their dynamic axes."""
        axes: Axes = {"inputs_embeds": {0: BATCH, 1: TOKENS}, "attention_mask": {0: BATCH, 1: TOTAL}}
        for name, part in self._past.items():
            axes[part] = {0: BATCH} if name.startswith("past_conv.") else {0: BATCH, 2: PAST}
        return axes

    @property
    def outputs(self) -> Axes:
        """Output names and dynamic axes, as in lfm_runtime.formats.contract."""
        axes: Axes = OrderedDict({"logits": {0: BATCH}})
        for name in past_names(self._config.text_config.layer_types):
            axes[present_name(name)] = {0: BATCH} if name.startswith("past_conv.") else {0: BATCH, 2: TOTAL}
        return axes

    def example(self, random: Callable[..., torch.Tensor]) -> dict[str, Any]:
        """Return inputs of which the second sequence begins with two tokens of padding."""
        text, batch, past, tokens = self._config.text_config, 3, 7, 5
        mask = torch.ones(batch, past + tokens, dtype=torch.long)
        mask[1, :2] = 0
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kinds = list(text.layer_types)
        return {
            "inputs_embeds": random(batch, tokens, text.hidden_size),
            "attention_mask": mask,
            "past_conv": [random(batch, text.hidden_size, text.conv_L_cache) for kind in kinds if kind == "conv"],
            "past_attention": [
                random(batch, text.num_key_value_heads, past, head_dim)
                for kind in kinds
                if kind != "conv"
                for _ in ("key", "value")
            ],
        }

    def flatten_output_collection_property(self, name: str, field: Any) -> dict[str, Any]:
        """Return the tensors of one list of the example, by the graph's input names."""
        prefix = "past_conv." if name == "past_conv" else "past_key_values."
        names = [one for one in past_names(self._config.text_config.layer_types) if one.startswith(prefix)]
        return dict(zip(names, field, strict=True))


def _numpy(value: Any) -> Any:
    return [one.numpy() for one in value] if isinstance(value, list) else value.numpy()


def _from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as e:  # no network, no such model, no rights; a name that cannot be
        cause = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise CheckpointError(
            f"{name} is neither a folder nor a model that can be downloaded from the hub ({cause}); give a "
            "checkpoint folder"
        ) from e


@contextmanager
def _named(stem: str) -> Iterator[None]:
    """A failing trace says which module it was. Tracers raise of every kind: what they raise is a fact about this
    module's code, but for a disk or memory that is full.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as e:
        cause = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        raise CheckpointError(f"{stem} could not be traced ({cause}); export without --portable, or report it") from e


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracers warn of every Python number; what was frozen wrongly, the tests find."""
    loggers = [logging.getLogger(name) for name in ("optimum", "transformers", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _with_data_file(traced: Path, place: Path) -> Path:
    """Weights in STEM.onnx_data, in whole pages, so that they can be mapped; shapes inside are left to the engine."""
    model = ir.load(traced)
    model.graph.name = place.stem
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
    ir.save(model, place, external_data=f"{place.name}_data")
    return place
