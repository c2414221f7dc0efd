"""How a run will be made, as one value: decided once, before anything is loaded, and passed on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from lfm_profiles import VARIANTS, Profile

from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.sampling import GenerationSettings
from lfm_runtime.engine.execution import Execution
from lfm_runtime.engine.failures import reason
from lfm_runtime.engine.gpu import CUDA_GRAPHS_SINCE
from lfm_runtime.engine.ort_release import onnxruntime_is
from lfm_runtime.engine.prepared import folder_of
from lfm_runtime.errors import BundleError, OutOfMemoryError, SettingError, counted, is_out_of_memory, more_memory
from lfm_runtime.formats.contract import CONV_INPUT, DECODER, VISION_ENCODER, number_of
from lfm_runtime.formats.onnx_file import output_names
from lfm_runtime.images.layout import ImageSettings, image_settings, lay_out
from lfm_runtime.setup.forecast import Forecast
from lfm_runtime.setup.profile import generation_changes, image_changes
from lfm_runtime.setup.variants import choose_variants

_FEW_VIEWS = 2
Size = tuple[int, int]
"""Width and height of an upright image in pixels."""


class Flags(TypedDict, total=False):
    """A profile's settings as the user gives them, one by one: see profiles/README.md. None is not given."""

    variant: str | None
    prefill: str | None
    kv: str | None
    providers: tuple[str, ...] | None
    strict_placement: bool | None
    threads: int | None
    affinity: str | tuple[int, ...] | None
    spinning: bool | int | None
    low_memory: bool | None
    arena: bool | None
    prepared: bool | None
    min_image_tokens: int | None
    max_image_tokens: int | None
    do_image_splitting: bool | None
    min_tiles: int | None
    max_tiles: int | None
    use_thumbnail: bool | None
    context: int | None
    max_new_tokens: int | None
    speculate: int | None


@dataclass(frozen=True)
class Ask:
    """What a run is expected to be asked, which memory is forecast for. Raises SettingError for sizes that no image
    has, and for less than no tokens or memory.
    """

    images: tuple[Size, ...]  # asked about together
    question: str = ""
    special: bool = True  # whether the question may hold special tokens
    kv_tokens: int = 0  # whose keys and values are kept at once, where more than this question's
    cache_mib: int = 0  # for prompts' beginnings and image features
    pictures: int = 0  # of the largest kind, whose features are kept
    beside_mib: int = 0  # what the process takes for something else
    once: bool = False  # this question alone, and then the process ends

    def __post_init__(self) -> None:
        for width, height in self.images:
            if not (width >= 1 and height >= 1):
                raise SettingError(f"an image of {width}×{height} pixels is impossible")
        if min(self.kv_tokens, self.cache_mib, self.pictures, self.beside_mib) < 0:
            given = f"kv_tokens {self.kv_tokens}, cache_mib {self.cache_mib}, pictures {self.pictures}, beside_mib "
            raise SettingError(f"{given}{self.beside_mib}: allowed are 0 and above")


@dataclass(frozen=True)
class Setup:
    """Everything decided, nothing loaded. `profile` has what was asked for and where each setting came from."""

    bundle: Bundle
    profile: Profile
    variant: str
    prefill: str | None  # the variant whose decoder reads prompts
    execution: Execution
    images: ImageSettings
    generation: GenerationSettings
    context_length: int  # tokens of prompt and answer together
    verifies: bool  # the decoder can take speculative tokens back
    ask: Ask
    forecast: Forecast | None = None  # None: the bundle tells too little
    steps: tuple[str, ...] = ()  # what was given up to fit the memory, in words
    bound: str = ""  # what asked for these steps: "400 MiB are free", or a profile's budget
    remedy: str = ""  # what would give it more, in words
    free_mib: int | None = None  # that this process might take when it was decided; None where nothing tells
    address_free_mib: int | None = None  # the same of the address space; None where ulimit -v does not limit it
    verify: bool = False  # hash large files as well
    unpacked: frozenset[Path] = frozenset()  # graphs that are used so few times that packing weights takes longer

    @property
    def paths(self) -> dict[str, Path]:
        """Paths of the variant's graphs, by stem."""
        return dict(self.bundle.graphs(self.variant)[1])

    @property
    def reductions(self) -> list[str]:
        """What was given up to fit the memory, and to fit what: a line each."""
        return [f"reduced to fit the memory ({self.bound}): {step}" for step in self.steps]

    @property
    def pictures_mib(self) -> int:
        """Memory for the features of all views of the pictures that are to be kept, each of the largest kind."""
        images, facts = self.images, self.bundle.facts
        views = 1 + (images.max_tiles if images.do_image_splitting else 0)
        tokens = views * max(images.max_image_tokens, (images.tile_size // images.cell) ** 2)
        hidden = facts.hidden if facts else 2048
        return -(-self.ask.pictures * tokens * hidden * 4 >> 20) + 1 if self.ask.pictures else 0

    @property
    def summary(self) -> str:
        """Variant, prefill decoder, threads and profile, in half a line."""
        prefill = f", prefill {self.prefill}" if self.prefill else ""
        low = ", one graph at a time" if self.execution.low_memory else ""
        return f"{self.variant}{prefill}{low}, {counted(self.execution.threads, 'thread')}, profile {self.profile.name}"

    @contextmanager
    def memory_is_told(self) -> Iterator[None]:
        """Where memory runs out, the error has the numbers of the forecast."""
        try:
            yield
        except (MemoryError, RuntimeError) as e:  # Python says it so where a thread's stack has no room
            if not is_out_of_memory(e):
                raise
            raise self.out_of_memory(e) from e

    def out_of_memory(self, cause: Exception) -> OutOfMemoryError:
        """The error for a run that memory did not suffice for, with what was expected and what was free."""
        peak = f"about {self.forecast.memory.peak:.0f} MiB" if self.forecast else "an unknown amount"
        free = "" if self.free_mib is None else f", {self.free_mib} MiB were free"
        if self.forecast and self.address_free_mib is not None:
            peak += f", {self.forecast.address_mib:.0f} MiB of address space"
            free = f", ulimit -v left {self.address_free_mib}"
        low = self.execution.low_memory or self.execution.on_gpu
        less = (
            "a smaller variant or fewer image tokens"
            if low
            else "--low-memory, a smaller variant or fewer image tokens"
        )
        said = reason(cause.__cause__ or cause)[:200] or type(cause).__name__
        return OutOfMemoryError(
            f"not enough memory for {self.bundle.folder}, {self.summary} ({said}): {peak} was forecast{free}; "
            f"{more_memory()}, or use {less}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the setup and its forecast as plain values for JSON."""
        of = self.forecast
        expected: dict[str, Any] = (
            {}
            if of is None
            else {
                "views": of.views,
                "image_tokens": of.image_tokens,
                "prompt_tokens": of.prompt_tokens,
                "new_tokens": of.new_tokens,
                "memory_mib": {"peak": of.memory.peak, "anonymous": of.memory.anonymous, "mapped": of.memory.mapped},
                "disk_mib": of.disk_mib,
            }
        )
        return {
            "profile": self.profile.name,
            "variant": self.variant,
            "prefill": self.prefill,
            "threads": self.execution.threads,
            "steps": list(self.steps),
            "bound": self.bound or None,
            **expected,
            "free_mib": self.free_mib,
        }


def settle(bundle: Bundle, profile: Profile, ask: Ask = Ask(()), *, verify: bool = False) -> Setup:
    """What a profile comes to with a bundle here, whether it fits the memory or not: see resolve.

    Raises:
        BundleError: the bundle lacks a variant.
        SettingError: the profile or a flag cannot hold.
    """
    execution = Execution.from_profile(profile)
    variant, prefill = choose_variants(bundle.variants, profile)
    _, paths = bundle.graphs(variant)
    if prefill:
        bundle.graphs(prefill)
    if execution.on_gpu:
        execution = replace(
            execution,
            cuda_graphs=VARIANTS[variant].on_gpu and onnxruntime_is(CUDA_GRAPHS_SINCE),
            engines=_engines(bundle, paths[VISION_ENCODER.stem]),
            most_patches=_most_patches(bundle.images, profile),
        )
    images = image_settings(bundle.images, image_changes(profile, bundle.images))
    verifies = not execution.on_gpu and _gives_conv_inputs(bundle, paths[DECODER.stem])
    return Setup(
        bundle,
        profile,
        variant,
        prefill,
        execution,
        images,
        bundle.generation.with_changes(generation_changes(profile, bundle.generation, verifies=verifies)),
        min(bundle.context_length, profile.context or bundle.context_length),
        verifies,
        ask,
        verify=verify,
        unpacked=_unpacked(bundle, variant, prefill, execution, sum(len(lay_out(*s, images).views) for s in ask.images))
        if ask.once or execution.low_memory
        else frozenset(),
    )


def _unpacked(bundle: Bundle, variant: str, prefill: str | None, execution: Execution, views: int) -> frozenset[Path]:
    """The int8 graphs that are used once or twice before they are given back: onnxruntime packs weights whenever a
    graph is loaded, prepared or not, in one thread, which takes as long as they are slower unpacked in 3 views of 256
    tokens or 1,200 tokens of a prompt (docs/log/2026-11-28.md). A decoder's are used for every token.
    """
    if execution.on_gpu or views > _FEW_VIEWS:
        return frozenset()
    graphs = [(VISION_ENCODER, bundle.graphs(variant)[1][VISION_ENCODER.stem])]
    if prefill:
        graphs.append((DECODER, bundle.graphs(prefill)[1][DECODER.stem]))
    return frozenset(path for graph, path in graphs if number_of(graph, path) == "int8")


def _engines(bundle: Bundle, vision: Path) -> Path:
    """Where TensorRT keeps what it made of these weights: it tells engines apart by names and shapes alone."""
    made_of = hashlib.sha256("\n".join(bundle.fingerprint(vision)).encode()).hexdigest()[:12]
    return folder_of(bundle.folder) / f"tensorrt-{made_of}"


def _most_patches(images: ImageSettings, profile: Profile) -> int:
    tokens = max(images.max_image_tokens, profile.max_image_tokens or 0)
    return max(tokens * images.downsample_factor**2, (images.tile_size // images.encoder_patch_size) ** 2)


def _gives_conv_inputs(bundle: Bundle, decoder: Path) -> bool:
    """Whether a decoder gives out what its convolutions have read: see contract.CONV_INPUT."""
    entry = bundle.manifest.graphs.get(bundle.name_of(decoder)) if bundle.manifest else None
    try:
        names = entry.outputs if entry else output_names(decoder)
    except BundleError:
        return False  # loading it will say what is wrong with it
    return any(name.startswith(CONV_INPUT) for name in names)
