"""What a run will take, before anything is loaded: views, tokens, memory, disk; and how to take less where that is too
much.

Memory is counted from the files' sizes and the model's shapes, with factors measured once (docs/performance.md); what
the process has already, libraries and tokenizer, is measured when the plan is made.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lfm_profiles import SMALLER, VARIANTS, Device, Profile, adds_int8_in_16_bits, stepped_down
from lfm_profiles.schema import TILE_SETTINGS
from lfm_profiles.variants import Number

from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.context import MOST_AT_ONCE
from lfm_runtime.engine.gpu_wheel import CUDA
from lfm_runtime.engine.prepared import find
from lfm_runtime.errors import BundleError, EdgeError
from lfm_runtime.formats.contract import DECODER, VISION_ENCODER, Graph, variant_of
from lfm_runtime.formats.files import damage_is, read_json_object
from lfm_runtime.formats.manifest import MANIFEST
from lfm_runtime.images import ImagePlan, image_settings, plan_image
from lfm_runtime.report import memory_mib
from lfm_runtime.setup.costs import Costs
from lfm_runtime.setup.profile import generation_changes, image_changes
from lfm_runtime.setup.variants import choose_variants
from lfm_runtime.text.prompt import Conversation, Message

_log = logging.getLogger(__name__)
MIB = float(1 << 20)
FEW_IMAGE_TOKENS = 64
_WIDER = 4.5
MOST_NEW = 256
"""Tokens of an answer that a plan reckons with: few are longer."""
Size = tuple[int, int]
"""Width and height of an upright image in pixels."""


class DoesNotFitError(EdgeError, MemoryError):
    """No plan fits the memory there is; the message has the numbers."""


@dataclass(frozen=True)
class Memory:
    """Of the process at its peak, MiB. What is mapped can be evicted and read again; what is anonymous cannot."""

    anonymous: float
    mapped: float

    @property
    def peak(self) -> float:
        """Resident."""
        return self.anonymous + self.mapped

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.anonymous + other.anonymous, self.mapped + other.mapped)


@dataclass(frozen=True)
class Shapes:
    """What of a bundle decides about memory."""

    hidden: int
    feed_forward: int
    vision_hidden: int
    vocabulary: int
    kv_bytes: int  # of a token, keys and values of all layers in float32
    rotary_bytes: int  # tables for all positions, made when the decoder is loaded
    weights: Mapping[Path, int]  # graph → bytes of all data files it reads from

    @staticmethod
    def of(bundle: Bundle) -> Shapes:
        """From manifest.json and config.json.

        Raises:
            BundleError: the bundle has no manifest, or one of them is damaged.
        """
        manifest = bundle.manifest
        if manifest is None:
            do = "export it with: lfm-edge export"
            raise BundleError(f"{bundle.folder} has no {MANIFEST}, from which plans are made; {do}")
        model = manifest.model
        config = read_json_object(bundle.folder / "config.json", BundleError)
        with damage_is(BundleError, bundle.folder / "config.json", "export the bundle again"):
            vision = int((config.get("vision_config") or {}).get("hidden_size", 768))
        kv_bytes = 8 * sum(kind == "full_attention" for kind in model.layers) * model.kv_heads * model.head_dim
        rotary = 4 * model.context_length * model.head_dim
        # Bundles before this was written: as in LFM2-VL-450M.
        wide = int(_WIDER * model.hidden) if model.feed_forward is None else model.feed_forward
        with damage_is(BundleError, bundle.folder / MANIFEST, "export the bundle again"):
            weights = {bundle.folder / name: manifest.weights_bytes(name) for name in manifest.graphs}
        return Shapes(model.hidden, wide, vision, model.vocabulary, kv_bytes, rotary, weights)


@dataclass(frozen=True)
class Plan:
    """One run, foreseen."""

    profile: Profile
    variant: str
    prefill: str | None
    images: tuple[ImagePlan, ...]
    image_tokens: int
    prompt_tokens: int
    new_tokens: int  # at most
    memory: Memory
    disk_mib: float

    @property
    def views(self) -> int:
        """The encoder runs."""
        return sum(len(plan.views) for plan in self.images)

    def times_ms(self, costs: Costs) -> dict[str, float]:
        """Stages, first token and each further one, from what an audit measured."""
        image = sum(plan.width * plan.height for plan in self.images) / 1e6 * costs.image_ms
        vision = sum(costs.vision_ms(view.rows * view.columns) for plan in self.images for view in plan.views)
        prefill = costs.prefill_ms(self.prompt_tokens)
        first = image + costs.load_ms + vision + prefill
        load = {"load": costs.load_ms} if self.profile.low_memory else {}
        return {
            "image": image,
            **load,
            "vision": vision,
            "prefill": prefill,
            "ttft": first,
            "per_token": costs.inter_token_ms,
        }


def process_memory() -> Memory:
    """Of this process now: what a run starts from. Taken before images are opened, which plans count themselves."""
    found = memory_mib()
    return Memory(found["rss_anon"] or found["rss"] or 0.0, found["rss_file"] or 0.0)


class Planner:
    """Foresees runs of one bundle about the same images and question."""

    def __init__(
        self, bundle: Bundle, images: Sequence[Size], question: str, start: Memory, *, special: bool = True
    ) -> None:
        """`start`: what process_memory gave; `special`: whether the question may hold special tokens.

        Raises:
            BundleError: the bundle has no manifest to plan from, or a damaged one.
        """
        self.bundle, self.images, self.start = bundle, images, start
        self.chat = Conversation([Message.user(question, len(images))], special=special)
        self.shapes = Shapes.of(bundle)

    def plan(self, profile: Profile) -> Plan:
        """One run.

        Raises:
            BundleError: the bundle lacks a variant.
            SettingError: the profile or a flag cannot hold.
        """
        bundle = self.bundle
        settings = image_settings(bundle.images, image_changes(profile, bundle.images))
        plans = tuple(plan_image(width, height, settings) for width, height in self.images)
        prompt = bundle.prompts.render(self.chat, plans)
        generation = bundle.generation.with_changes(generation_changes(profile, bundle.generation, verifies=False))
        context = min(bundle.context_length, profile.context or bundle.context_length)
        new = max(0, min(generation.max_new_tokens, context - len(prompt.ids)))
        variant, prefill = choose_variants(bundle, profile)
        variant, graphs = bundle.graphs(variant)
        disk = self._disk_mib(graphs, prefill)
        plan = Plan(profile, variant, prefill, plans, prompt.image_tokens, len(prompt.ids), new, self.start, disk)
        return replace(plan, memory=self.start + self._run_memory(plan, settings.tile_size))

    def size(self, variant: str) -> int:
        """Bytes of a variant's weights."""
        return sum(self.shapes.weights[path] for path in self.bundle.graphs(variant)[1].values())

    def _disk_mib(self, graphs: Mapping[str, Path], prefill: str | None) -> float:
        paths = {*graphs.values(), *([self.bundle.graphs(prefill)[1][DECODER.stem]] if prefill else [])}
        return sum(self.shapes.weights[path] for path in paths) / MIB

    def _run_memory(self, plan: Plan, tile_size: int) -> Memory:
        """What a run takes at its peak, beside what the process starts with."""
        shapes, profile, plans, sizes = self.shapes, plan.profile, plan.images, self.images
        own = _SESSIONS + Memory(shapes.rotary_bytes / MIB, 0)
        graphs = self.bundle.graphs(plan.variant)[1]
        vision = self._loaded(profile, VISION_ENCODER, graphs[VISION_ENCODER.stem])
        paths = [graphs[DECODER.stem], *([self.bundle.graphs(plan.prefill)[1][DECODER.stem]] if plan.prefill else [])]
        decoders = [self._loaded(profile, DECODER, path) for path in paths]
        decoder = sum((d.kept for d in decoders), Memory(0, 0))

        patches = max((view.rows * view.columns for image in plans for view in image.views), default=0)
        encoding = 4 * patches * _VISION_WORK * shapes.vision_hidden / MIB
        features = (
            4 * 4 * plan.image_tokens * shapes.hidden / MIB
        )  # a view's, all views', the embeddings they are put into
        step = -(-plan.prompt_tokens // -(-plan.prompt_tokens // MOST_AT_ONCE))  # prompts are read in equal parts
        reading = 4 * step * _TEXT_WORK * shapes.hidden / MIB
        if _number(DECODER, paths[-1]) == "int8":
            reading += 4 * step * _INT8_WORK * shapes.feed_forward / MIB
        tokens = plan.prompt_tokens + min(plan.new_tokens, MOST_NEW)
        kv = tokens * shapes.kv_bytes / (4 if VARIANTS[plan.variant].keys == "int8" else 1) / MIB
        held = sum(width * height * 3 for width, height in sizes) / MIB  # all images are open until the answer ends
        cutting = max((_cutting(size, image, tile_size) for size, image in zip(sizes, plans, strict=True)), default=0.0)
        answering = Memory(features + reading + kv + held, 0) + _END
        if profile.low_memory:  # the encoder's memory is given back before the decoder is loaded
            seeing = (
                vision.kept + Memory(max(vision.loading, encoding + features + held + cutting), 0)
                if plans
                else Memory(0, 0)
            )
            stages = [seeing, decoder + Memory(max(d.loading for d in decoders), 0), decoder + answering]
        else:
            both = decoder + (
                vision.kept if plans else Memory(vision.kept.anonymous, 0)
            )  # what is mapped is read when it is used
            loading, seeing = (
                Memory(max(d.loading for d in decoders), 0),
                Memory(encoding + features + held + cutting, 0),
            )
            stages = [both + loading, both + seeing, both + Memory(encoding, 0) + answering]
        return own + max(stages, key=lambda stage: stage.peak)

    def _loaded(self, profile: Profile, graph: Graph, path: Path) -> _Loaded:
        weights = self.shapes.weights[path] / MIB
        kind = _number(graph, path)
        head = self.shapes.vocabulary * self.shapes.hidden * _HEAD_BYTES[kind] / MIB if graph is DECODER else 0.0
        found = find(self.bundle, path).path if profile.prepared else path
        if found != path:
            whole = sum(file.stat().st_size for file in found.parent.iterdir()) / MIB
            return _Loaded(Memory(0, max(0.0, whole - weights)), 0)  # plain and packed weights; the packed are mapped
        packed = _COPIED[graph.stem] if kind == "int8" and adds_int8_in_16_bits() else _PACKED[kind]
        return _Loaded(Memory(packed * weights, 0), head)


# ----------------------------------------------------------------------------------------------------------- factors

# Factors, measured with onnxruntime 1.31 on x86 (scripts/bench/check_plan.py prints what they are worth).
_PACKED = {"fp32": 1.0, "fp16": 2.0, "int8": 1.04, "int4": 1.24}
"""What a graph takes in anonymous memory when it is not prepared, against its weights' file. fp16 weights become fp32
on the CPU.
"""
_COPIED = {VISION_ENCODER.stem: 1.72, DECODER.stem: 1.36}
"""The same for int8 on x86 without VNNI, where onnxruntime makes an unsigned copy."""
_SESSIONS = Memory(6.0, 11.0)
"""onnxruntime's own, and its library's pages."""
_VISION_WORK, _TEXT_WORK, _INT8_WORK = 17.0, 46.0, 4.4
"""What a patch, or a token of a prompt, is worked on with: float32 vectors of the hidden size; int8 has some of the
feed-forward's too.
"""
_HEAD_BYTES = {"fp32": 4, "fp16": 4, "int8": 1, "int4": 0.5}
_IMAGE_COPIES = 0.6
"""Of the decoded image, beside itself, while it is opened and resized."""
_END = Memory(1.0, 1.0)
"""Of the answer itself."""


@dataclass(frozen=True)
class _Loaded:
    """A graph in memory."""

    kept: Memory
    loading: float  # beside it, anonymous, while it is loaded: the largest weight is there twice


def _number(graph: Graph, path: Path) -> Number:
    """What a graph's weights are, as the row of the variant says whose file it is."""
    row = variant_of(path, graph) or VARIANTS["fp32"]
    return row.vision if graph is VISION_ENCODER else row.weights


def _cutting(size: Size, plan: ImagePlan, tile_size: int) -> float:
    """MiB for opening, resizing and cutting one image."""
    width, height = (plan.columns * tile_size, plan.rows * tile_size) if plan.tiled else plan.whole_size
    between = width * size[1]  # columns are resized first
    return 3 * (_IMAGE_COPIES * size[0] * size[1] + between + 2 * width * height) / MIB


# --------------------------------------------------------------------------------------------------- taking less of it


@dataclass(frozen=True)
class Fitted:
    """A plan that fits, and what was given up for it."""

    plan: Plan
    steps: tuple[str, ...]
    free_mib: int | None  # that this process may still take; None where nothing tells


def fit(planner: Planner, profile: Profile, device: Device, *, force: bool = False) -> Fitted:
    """A plan that this machine has the memory for. Stepping down, in this order, until it fits: prompts read by the
    variant's own decoder, fewer tiles, no tiles, fewer image tokens, one graph at a time, a smaller variant; then
    whatever of it was not needed is taken back. What the user set by a flag stays. With `force` the first plan stands.

    Raises:
        DoesNotFitError: not even the smallest fits; with the numbers.
        BundleError, SettingError: see Planner.plan.
    """
    first = planner.plan(profile)
    if CUDA in profile.providers:  # whose memory is another's, and was looked at
        return Fitted(first, (), device.free_mib)
    free, whole, budget = device.free_mib, device.usable_mib, profile.budget.peak_rss_mib

    def fits(plan: Plan) -> bool:
        peak = plan.memory.peak
        return (
            (free is None or peak - planner.start.peak <= free)
            and (whole is None or peak <= whole)
            and (budget is None or peak <= budget)
        )

    if free is None:
        say_memory_is_unknown()
    if force or fits(first):
        return Fitted(first, (), free)
    taken: list[tuple[str, dict[str, Any]]] = []

    def with_steps(steps: Sequence[tuple[str, dict[str, Any]]]) -> Plan:
        changed = profile
        for _, settings in steps:
            changed = stepped_down(changed, settings)
        return planner.plan(changed)

    smallest = first
    for step in _steps_down(planner, first):
        taken.append(step)
        plan = with_steps(taken)
        if plan.memory.peak < smallest.memory.peak:
            smallest = plan
        if fits(plan):
            for done in list(taken):
                rest = [s for s in taken if s is not done]
                if fits(with_steps(rest)):
                    taken = rest
            return Fitted(with_steps(taken), tuple(words for words, _ in taken), free)
    wanted = (
        f"{smallest.memory.peak:.0f} MiB at its smallest ({smallest.memory.anonymous:.0f} anonymous; "
        f"{smallest.variant})"
    )
    there = (
        f"{whole} MiB are there ({device.limit_by or 'the machine'}), {free} free beside this process's "
        f"{planner.start.peak:.0f}"
    )
    there += f", and the budget of profile {profile.name} is {budget} MiB" if budget else ""
    raise DoesNotFitError(
        f"{planner.bundle.folder} would take {wanted}; {there}. Close other programs, take a smaller model, or use "
        "--force"
    )


@functools.cache
def say_memory_is_unknown() -> None:
    """Once a process."""
    _log.warning(
        "lfm-edge: how much memory is free cannot be known here (/proc/meminfo); whether a run fits is not checked"
    )


def _steps_down(planner: Planner, plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what it is, settings) of each step that the user's flags leave open."""
    profile, bundle = plan.profile, planner.bundle
    settings = image_settings(bundle.images, image_changes(profile, bundle.images))

    def free(*names: str) -> bool:
        return not any(profile.is_flag(name) for name in names)

    if plan.prefill and free("prefill"):
        yield f"prompts read by {plan.variant}'s own decoder, not {plan.prefill}'s", {"prefill": "none"}
    if any(image.tiled for image in plan.images) and free("do_image_splitting"):
        tiles = max(image.rows * image.columns for image in plan.images)
        if tiles > 4 and settings.min_tiles <= 4 and free("max_tiles"):
            yield "at most 4 tiles", {"max_tiles": 4}
        if free(*TILE_SETTINGS):
            yield "no tiles", {"do_image_splitting": False}
    if plan.images and settings.max_image_tokens > FEW_IMAGE_TOKENS and free("max_image_tokens", "min_image_tokens"):
        whole = (
            {"do_image_splitting": False} if free("do_image_splitting", *TILE_SETTINGS) else {}
        )  # else more images would count as large
        yield f"at most {FEW_IMAGE_TOKENS} tokens an image", {"max_image_tokens": FEW_IMAGE_TOKENS, **whole}
    if not profile.low_memory and free("low_memory", "prefill"):
        yield "one graph in memory at a time", {"low_memory": True}
    if free("variant"):
        smaller = [v for v in SMALLER if v in bundle.variants and planner.size(v) < planner.size(plan.variant)]
        for variant in smaller:
            yield f"{variant} instead of {plan.variant}", {"variant": (variant,)}
