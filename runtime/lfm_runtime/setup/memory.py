"""The memory a run takes at its peak, reckoned from the files' sizes and the model's shapes, with factors measured once
(docs/performance.md). What the process has already, libraries and tokenizer, is measured when it is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lfm_profiles import VARIANTS, adds_int8_in_16_bits

from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.context import MOST_AT_ONCE
from lfm_runtime.engine.gpu import GpuError, gpu_memory
from lfm_runtime.engine.prepared import find
from lfm_runtime.errors import BundleError
from lfm_runtime.formats.contract import DECODER, VISION_ENCODER, GraphSpec, number_of
from lfm_runtime.formats.files import damage_is, read_json_object
from lfm_runtime.formats.manifest import MANIFEST
from lfm_runtime.formats.onnx_file import external_bytes, external_files
from lfm_runtime.images.layout import ImageLayout, lay_out
from lfm_runtime.setup.forecast import MIB, Forecast, Memory
from lfm_runtime.setup.setup import Setup, Size
from lfm_runtime.text.messages import Conversation, Message

_WIDER = 4.5  # the feed-forward's size over the hidden size in LFM2-VL-450M, for bundles that do not say it
MOST_NEW = 256
"""Tokens of an answer that are reckoned with: few are longer."""
_GPU_OVERHEAD_MIB = 600
"""A CUDA context, its libraries' workspaces and what a prompt and a few views are worked on with."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of a bundle that its memory depends on."""

    hidden: int
    feed_forward: int
    vision_hidden: int
    vocabulary: int
    kv_bytes: int  # of a token, keys and values of all layers in float32
    rotary_bytes: int  # tables for all positions, made when the decoder is loaded

    @staticmethod
    def of(bundle: Bundle) -> Shapes:
        """From manifest.json and config.json; of a hub folder from config.json alone.

        Raises:
            BundleError: one of them is damaged, or config.json does not say it.
        """
        path = bundle.folder / "config.json"
        config = read_json_object(path, BundleError)
        with damage_is(BundleError, path, "export the bundle again"):
            vision = int((config.get("vision_config") or {}).get("hidden_size", 768))
        model = bundle.facts
        if model is None:
            raise BundleError(f"{path} does not tell the model's sizes; copy it from the checkpoint")
        attention = sum(kind == "full_attention" for kind in model.layers)
        wide = int(_WIDER * model.hidden) if model.feed_forward is None else model.feed_forward
        kv_bytes = 8 * attention * model.kv_heads * model.head_dim
        return Shapes(model.hidden, wide, vision, model.vocabulary, kv_bytes, 4 * model.context_length * model.head_dim)


def forecast(setup: Setup, start: Memory) -> Forecast | None:
    """What a run of a setup takes; `start`: what the process has before it. None where a hub folder tells too little.

    Raises:
        BundleError: a file of the bundle is damaged.
    """
    bundle = setup.bundle
    try:
        shapes = Shapes.of(bundle)
    except BundleError:
        if bundle.manifest:
            raise
        return None
    layouts = tuple(lay_out(width, height, setup.images) for width, height in setup.ask.images)
    chat = Conversation([Message.user(setup.ask.question, len(layouts))], special=setup.ask.special)
    prompt = bundle.prompts.render(chat, layouts)
    new = max(0, min(setup.generation.max_new_tokens, setup.context_length - len(prompt.ids)))
    prefill = [bundle.graphs(setup.prefill)[1][DECODER.stem]] if setup.prefill else []
    disk = weights_on_disk(bundle, {*setup.paths.values(), *prefill}) / MIB
    found = Forecast(layouts, prompt.image_tokens, len(prompt.ids), new, start, start, disk)
    memory = _run_memory(setup, shapes, found)
    return replace(found, memory=start + memory, address_mib=memory.peak + _address_mib(setup))


def variant_bytes(bundle: Bundle, variant: str) -> int:
    """Return the bytes of a variant's weights, all graphs together."""
    return sum(weights_of(bundle, path) for path in bundle.graphs(variant)[1].values())


def check_gpu_memory(bundle: Bundle, variant: str) -> None:
    """Raise GpuError where a variant's weights would not fit on the GPU beside what is in use."""
    memory = gpu_memory()
    weights = int(variant_bytes(bundle, variant) / MIB)
    if memory and memory[0] < weights + _GPU_OVERHEAD_MIB:
        raise GpuError(
            f"the GPU has {memory[0]} of {memory[1]} MiB free, but {weights} MiB for weights and about "
            f"{_GPU_OVERHEAD_MIB} MiB of working memory are needed; end other programs on it, or use a smaller "
            "variant (int4-fp16)"
        )


def weights_of(bundle: Bundle, graph: Path) -> int:
    """Return the bytes of the weights that a graph reads."""
    name = bundle.name_of(graph)
    if bundle.manifest and name in bundle.manifest.graphs:
        with damage_is(BundleError, bundle.folder / MANIFEST, "export the bundle again"):
            return bundle.manifest.weights_bytes(name)
    return external_bytes(graph) or graph.stat().st_size


def weights_on_disk(bundle: Bundle, graphs: Iterable[Path]) -> int:
    """Return the bytes of the files of weights that graphs read, one that several read counted once."""
    found: dict[Path, int] = {}
    for graph in graphs:
        name = bundle.name_of(graph)
        if bundle.manifest and name in bundle.manifest.graphs:
            names = bundle.manifest.graphs[name].data
            found |= {bundle.folder / data: bundle.manifest.files[data].bytes for data in names}
        else:
            files = [graph.parent / data for data in external_files(graph)] or [graph]
            found |= {path: path.stat().st_size for path in files}
    return sum(found.values())


def _run_memory(setup: Setup, shapes: Shapes, run: Forecast) -> Memory:
    """What a run takes at its peak, beside what the process starts with."""
    sizes, layouts = setup.ask.images, run.images
    own = _SESSIONS + Memory(shapes.rotary_bytes / MIB, 0)
    vision = _loaded(setup, shapes, VISION_ENCODER, setup.paths[VISION_ENCODER.stem])
    paths = [setup.paths[DECODER.stem]]
    if setup.prefill:
        paths.append(setup.bundle.graphs(setup.prefill)[1][DECODER.stem])
    decoders = [_loaded(setup, shapes, DECODER, path) for path in paths]
    decoder = sum((d.kept for d in decoders), Memory(0, 0))

    patches = max((view.rows * view.columns for image in layouts for view in image.views), default=0)
    encoding = 4 * patches * _VISION_WORK * shapes.vision_hidden / MIB
    features = 4 * 4 * run.image_tokens * shapes.hidden / MIB  # a tile's, all tiles', the embeddings
    step = -(-run.prompt_tokens // -(-run.prompt_tokens // MOST_AT_ONCE))  # prompts are read in equal parts
    reading = 4 * step * _TEXT_WORK * shapes.hidden / MIB
    if number_of(DECODER, paths[-1]) == "int8":
        reading += 4 * step * _INT8_WORK * shapes.feed_forward / MIB
    tokens = max(run.prompt_tokens + min(run.new_tokens, MOST_NEW), setup.ask.kv_tokens)
    kv = tokens * shapes.kv_bytes / (4 if VARIANTS[setup.variant].keys == "int8" else 1) / MIB
    held = sum(width * height * 3 for width, height in sizes) / MIB  # all images are open until the answer ends
    tile = setup.images.tile_size
    cutting = max((_cutting(size, image, tile) for size, image in zip(sizes, layouts, strict=True)), default=0.0)
    loading = max(d.loading for d in decoders)
    seeing = encoding + features + held + cutting
    kept = setup.ask.cache_mib + setup.pictures_mib + setup.ask.beside_mib
    answering = Memory(features + reading + kv + held + kept, 0) + _END
    if setup.execution.low_memory:  # the encoder's memory is given back before the decoder is loaded
        first = vision.kept + Memory(max(vision.loading, seeing), 0) if layouts else Memory(0, 0)
        stages = [first, decoder + Memory(loading, 0), decoder + answering]
    else:  # what is mapped is read when it is used
        both = decoder + (vision.kept if layouts else Memory(vision.kept.anonymous, 0))
        stages = [both + Memory(loading, 0), both + Memory(seeing, 0), both + Memory(encoding, 0) + answering]
    return own + max(stages, key=lambda stage: stage.peak)


def _address_mib(setup: Setup) -> float:
    """Address space that is reserved beside what becomes resident: each thread of a session has a stack, and glibc
    reserves a heap for it.
    """
    sessions = 1 if setup.execution.low_memory else 3 if setup.prefill else 2  # those with threads of their own
    return _RESERVED_MIB + sessions * (setup.execution.threads - 1) * (_stack_mib() + _HEAP_MIB)


def _stack_mib() -> float:
    if sys.platform == "win32":
        return 1.0
    import resource

    size = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return _STACK_MIB if size in (resource.RLIM_INFINITY, -1) else size / MIB


def _loaded(setup: Setup, shapes: Shapes, graph: GraphSpec, path: Path) -> _Loaded:
    weights, number = weights_of(setup.bundle, path) / MIB, number_of(graph, path)
    head = shapes.vocabulary * shapes.hidden * _HEAD_BYTES[number] / MIB if graph is DECODER else 0.0
    if path in setup.unpacked:
        return _Loaded(Memory(0, weights), 0)
    found = find(setup.bundle, path).path if setup.execution.prepared else path
    if found != path:
        whole = sum(file.stat().st_size for file in found.parent.iterdir()) / MIB
        return _Loaded(Memory(0, max(0.0, whole - weights)), 0)  # plain and packed weights; the packed are mapped
    packed = _COPIED[graph.stem] if number == "int8" and adds_int8_in_16_bits() else _PACKED[number]
    if number == "int4" and (block := _block(setup.bundle, path)):
        packed = (0.5 + _PACKED_SCALE / block) / (0.5 + 2 / block)
    return _Loaded(Memory(packed * weights, 0), head)


# ----------------------------------------------------------------------------------------------------------- factors

# Factors, measured with onnxruntime 1.31 on x86 (scripts/bench/check_plan.py prints what they are worth).
_PACKED = {"fp32": 1.0, "fp16": 2.0, "int8": 1.04, "int4": 1.24}
"""What a graph takes in anonymous memory when it is not prepared, against its weights' file. fp16 weights become fp32
on the CPU. int4: where the manifest does not say how many weights share a scale.
"""
_PACKED_SCALE = 15.5
"""Bytes for each scale of packed 4-bit weights; a file has 2. Blocks of 64 and 128, 450M and 3B, onnxruntime 1.32."""
_COPIED = {VISION_ENCODER.stem: 1.72, DECODER.stem: 1.36}
"""The same for int8 on x86 without VNNI, where onnxruntime makes an unsigned copy."""
_SESSIONS = Memory(6.0, 11.0)
"""onnxruntime's own, and its library's pages."""
_VISION_WORK, _TEXT_WORK, _INT8_WORK = 17.0, 46.0, 4.4
"""Peak activations per patch, and per token of a prompt, in float32 vectors of the hidden size; with int8 weights also
in vectors of the feed-forward's size.
"""
_HEAD_BYTES = {"fp32": 4, "fp16": 4, "int8": 1, "int4": 0.5}
_IMAGE_COPIES = 0.6
"""Of the decoded image, beside itself, while it is opened and resized."""
_HEAP_MIB, _STACK_MIB = 64.0, 8.0
"""HEAP_MAX_SIZE of glibc's malloc on 64 bits, reserved for each thread; the usual stack."""
_RESERVED_MIB = 180.0
"""Address space beside all that, at most (measured with LFM2-VL-450M: 38 to 162)."""
_END = Memory(1.0, 1.0)
"""Of the answer itself."""


@dataclass(frozen=True)
class _Loaded:
    """Memory of one graph: what it keeps, and what it takes while it is loaded."""

    kept: Memory
    loading: float  # beside it, anonymous, while it is loaded: the largest weight is there twice


def _block(bundle: Bundle, path: Path) -> int:
    """The least number of 4-bit weights of a graph that share a scale, as the manifest's recipe says; 0 where none
    does.
    """
    for name, graphs in bundle.variants.items():
        if path in graphs.values() and bundle.manifest:
            with damage_is(BundleError, bundle.folder / MANIFEST, "export the bundle again"):
                rules = bundle.manifest.quantization.get(name, {}).get("recipe", [])
                return min((int(rule["block"]) for rule in rules if rule["bits"] == 4), default=0)
    return 0


def _cutting(size: Size, plan: ImageLayout, tile_size: int) -> float:
    """Return the MiB for opening, resizing and cutting one image."""
    width, height = (plan.columns * tile_size, plan.rows * tile_size) if plan.tiled else plan.whole_size
    between = width * size[1]  # columns are resized first
    return 3 * (_IMAGE_COPIES * size[0] * size[1] + between + 2 * width * height) / MIB
