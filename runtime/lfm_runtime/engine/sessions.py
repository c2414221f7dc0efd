"""onnxruntime sessions are created here and nowhere else: which graphs of a bundle, from which files, when, and for how
long.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import psutil
from lfm_profiles import VARIANTS, Profile, adds_int8_in_16_bits, default_threads, physical_cores
from onnxruntime.capi import onnxruntime_pybind11_state

from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.decoder import Decoder, DecoderSessions
from lfm_runtime.decode.device_state import OrtMemory
from lfm_runtime.engine.gpu import (
    CUDA_GRAPHS_SINCE,
    PLACEMENT_SINCE,
    RECORD_PLACEMENT,
    GpuError,
    cannot_be_captured,
    check_placement,
    full,
    is_full,
    is_of_a_gpu,
    left_to_cpu,
    provider_options,
    unusable,
)
from lfm_runtime.engine.gpu_wheel import CPU, CUDA
from lfm_runtime.engine.ort_release import onnxruntime_is
from lfm_runtime.engine.prepared import find, folder_of
from lfm_runtime.errors import BundleError, SettingError
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, KV_SCALES, VISION_ENCODER, Graph
from lfm_runtime.images import ImageSettings
from lfm_runtime.setup.variants import choose_variants

_log = logging.getLogger(__name__)

_FATAL_SEVERITY = 4  # errors are raised as well, and said once
_IN_ITS_SOURCE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+:\d+ [^()]*\([^()]*\)( const)?( \[with [^\]]*\])? "
)
_PACKED = (
    1.2  # what graphs take in memory, against their weights' files: 4-bit scales become fp32, and a prompt is worked on
)
# onnxruntime's exceptions share no base class of their own; these are all of them. A run with bindings, and what is
# about memory of a device, raises plain RuntimeErrors.
_FAILURES: tuple[type[Exception], ...] = tuple(
    c for c in vars(onnxruntime_pybind11_state).values() if isinstance(c, type) and issubclass(c, Exception)
)


@contextmanager
def failures_are_ours(what: object) -> Iterator[None]:
    """An exception of onnxruntime becomes a BundleError about `what`, in one line."""
    try:
        yield
    except Exception as e:
        if not _is_onnxruntimes(e):
            raise
        raise BundleError(
            f"{what} does not work with onnxruntime {ort.__version__} ({_reason(e)[:300]}); check it with "
            "--verify, or export it again"
        ) from e


def _reason(e: BaseException | None) -> str:
    """What onnxruntime says, in one line and without where in its source it says it."""
    return _IN_ITS_SOURCE.sub("", " ".join(str(e).split()))


def _is_onnxruntimes(e: Exception) -> bool:
    return isinstance(e, _FAILURES) or (
        type(e) is RuntimeError and ("onnxruntime" in str(e) or str(e).startswith("Error in execution"))
    )


def check_onnxruntime(bundle: Bundle, path: Path) -> None:
    """Raise BundleError where a graph needs a newer onnxruntime, as the manifest says."""
    wanted = bundle.min_onnxruntime(path)
    if not onnxruntime_is(wanted):
        raise BundleError(
            f"{path} needs onnxruntime {wanted}, this is {ort.__version__}; update it, or take another variant"
        )


@dataclass(frozen=True)
class Execution:
    """How a graph is run."""

    threads: int  # of each operator
    affinity: tuple[int, ...] = ()  # processors, one for each thread; empty: wherever the system puts them
    spinning: bool | int = (
        True  # how long threads wait for the next operator without sleeping, µs; True: as onnxruntime does
    )
    arena: bool = True
    packed: bool = (
        True  # make the copy of the weights that kernels are fast with; else they are used as the file has them, mapped
    )
    providers: tuple[str, ...] = (CPU,)
    cuda_graphs: bool = False  # steps of the decode loop are captured and replayed
    engines: Path | None = None  # where TensorRT keeps what it made
    most_patches: int = 0  # of a view

    @property
    def on_gpu(self) -> bool:
        """Whether steps of the decode loop are computed on a device with memory of its own."""
        return CUDA in self.providers

    @staticmethod
    def of(profile: Profile) -> Execution:
        """What a profile asks for, here.

        Raises:
            SettingError: processors that are not there, or a provider this onnxruntime lacks.
        """
        available = ort.get_available_providers()
        if missing := [name for name in profile.providers if name not in available]:
            raise SettingError(
                f"profile {profile.name} needs {missing[0]}, this onnxruntime {ort.__version__} has "
                f"{', '.join(available)}; "
                "install an onnxruntime for the GPU, or choose another profile"
            )
        usable = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        )
        threads = profile.threads or (
            len(profile.affinity) if isinstance(profile.affinity, tuple) else default_threads()
        )
        if threads > len(usable):
            _log.warning("lfm-edge: %d threads on %d processors only wait for each other", threads, len(usable))
        cores: tuple[int, ...] = ()
        if profile.affinity != "none":
            cores = profile.affinity if isinstance(profile.affinity, tuple) else tuple(physical_cores())
            if not hasattr(os, "sched_setaffinity"):
                raise SettingError("affinity cannot be set on this operating system; leave it out")
            if strangers := sorted(set(cores) - set(usable)):
                listed = ", ".join(map(str, usable))
                raise SettingError(f"affinity: this process may not use processor {strangers[0]}; it may use {listed}")
            if len(cores) < threads:
                raise SettingError(
                    f"affinity has {len(cores)} processors for {threads} threads; name as many, or lower threads"
                )
        spinning = profile.spinning
        if type(spinning) is int and not onnxruntime_is("1.26"):
            _log.warning(
                "lfm-edge: onnxruntime %s cannot limit spinning, 1.26 can; threads spin as it does", ort.__version__
            )
            spinning = True
        return Execution(threads, cores[:threads], spinning, profile.arena, providers=profile.providers)

    def options(self) -> ort.SessionOptions:
        """For a session."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_SEVERITY
        # Every step has new shapes (context grows by one), so a memory pattern would be planned and kept for each.
        options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = self.arena
        if not self.packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self.affinity[
            1:
        ]:  # onnxruntime counts processors from 1, and the calling thread is the first of its threads
            options.add_session_config_entry(
                "session.intra_op_thread_affinities", ";".join(str(core + 1) for core in self.affinity[1:])
            )
        if self.spinning is not True:
            options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spinning else "0")
        if type(self.spinning) is int:
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(self.spinning))
        # Where int8 products overflow (a demo encoder falls from 0.999 to 0.96 cosine) another kernel is asked for:
        # right, 19 % slower, and with a copy of the weights. Where they do not, the same request makes the encoder 1.6
        # times as slow for nothing.
        if adds_int8_in_16_bits():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if self.on_gpu and onnxruntime_is(PLACEMENT_SINCE):
            options.add_session_config_entry(RECORD_PLACEMENT, "1")
        return options

    def pin_this_thread(self) -> None:
        """The calling thread computes as well: keep it on the first processor, where it may be moved there."""
        if self.affinity:
            try:
                os.sched_setaffinity(0, self.affinity[:1])
            except OSError as e:
                _log.warning(
                    "lfm-edge: affinity: this process may not move to processor %d: %s", self.affinity[0], e.strerror
                )


class Graphs:
    """The graphs of one variant of a bundle, loaded all at once, or with `low_memory` one stage at a time."""

    def __init__(self, bundle: Bundle, profile: Profile, *, verify: bool = False) -> None:
        """Nothing is loaded yet. `verify`: hash all of what was prepared before it is used.

        Raises:
            BundleError: the bundle lacks a variant the user named, or it needs another onnxruntime.
            SettingError: what the profile asks for is not possible here, or has no effect.
        """
        self.execution = Execution.of(profile)
        if profile.is_flag("strict_placement") and not self.execution.on_gpu:
            raise SettingError(
                f"strict_placement has no effect: profile {profile.name} computes on the CPU; leave it out"
            )
        name, self.prefill = choose_variants(bundle, profile)
        self.variant, self.paths = bundle.graphs(name)
        if self.execution.on_gpu:
            self.execution = replace(
                self.execution,
                cuda_graphs=VARIANTS[self.variant].on_gpu
                and onnxruntime_is(CUDA_GRAPHS_SINCE),  # attention in fp32 is left to the CPU
                engines=_engines(bundle, self.paths[VISION_ENCODER.stem]),
                most_patches=_most_patches(bundle.images, profile),
            )
        self.prefill_path = bundle.graphs(self.prefill)[1][DECODER.stem] if self.prefill else None
        self.load_ms: dict[str, float] = {}  # file → what it took, of the last time
        if self.prefill_path and (short := _missing_memory([*self.paths.values(), self.prefill_path])):
            _log.warning(
                "lfm-edge: prefill %s is left out: with it the graphs take about %d MiB, %d are available",
                self.prefill,
                *short,
            )
            self.prefill = self.prefill_path = None
        for path in (*self.paths.values(), *([self.prefill_path] if self.prefill_path else [])):
            check_onnxruntime(bundle, path)
        self.low_memory = profile.low_memory
        self.decoder = Decoder(
            self._load_decoder,
            self.paths[DECODER.stem],
            shrink=self.low_memory and self.execution.arena,
            memory=OrtMemory("cuda") if self.execution.on_gpu else None,
            longest=bundle.context_length,
        )
        self._strict_placement = profile.strict_placement
        self._unprepared: set[str] = set()
        self._said_unprepared = False
        self._bundle, self._prepared, self._verify = bundle, profile.prepared, verify
        self._vision: ort.InferenceSession | None = None

    @property
    def is_prepared(self) -> bool:
        """Whether every graph loaded so far, the embedding table excepted, is as `lfm-edge prepare` wrote it."""
        return bool(self.load_ms) and not self._unprepared

    def load(self) -> None:
        """Load everything, the encoder beside the decoder; with low_memory nothing yet."""
        if self.low_memory:
            self.execution.pin_this_thread()
            return
        with ThreadPoolExecutor(1) as other:
            vision = other.submit(self._load, VISION_ENCODER, self.paths[VISION_ENCODER.stem])
            self.decoder.sessions  # noqa: B018
            self._vision = vision.result()
        self.execution.pin_this_thread()
        if self.execution.on_gpu:
            self._try_a_step()

    def _try_a_step(self) -> None:
        """On a GPU the first tokens in new buffers are captured, one for each turn, which takes time and can fail;
        better now. Where it does, steps are run uncaptured.
        """
        failure = self._failure_of_a_step()
        if failure and self.execution.cuda_graphs and not is_full(failure):
            self.execution = replace(self.execution, cuda_graphs=False)
            self.decoder.release()
            captured, failure = failure, self._failure_of_a_step()
            if not failure:
                _log.warning("lfm-edge: steps are run without CUDA graphs: %s", captured[:300])
        if failure:
            raise self._explained(failure, self.paths[DECODER.stem])

    def _failure_of_a_step(self) -> str | None:
        """As words: the exception holds on to the session, whose weights would be in memory twice once it is loaded
        again.
        """
        try:
            state = self.decoder.start(1)
            for _ in range(2):
                state.step_token(0)
        except Exception as e:
            if not _is_onnxruntimes(e):
                raise
            return _reason(e)
        return None

    def _explained(self, failure: str, path: Path) -> GpuError:
        return full(self.paths.values(), failure) if is_full(failure) else unusable(path, CUDA, failure)

    def vision(self) -> ort.InferenceSession:
        """The vision encoder. With low_memory the decoder leaves memory first, and the encoder does when the caller
        lets go of it.
        """
        if self.low_memory:
            self.decoder.release()
        return self._vision or self._load(VISION_ENCODER, self.paths[VISION_ENCODER.stem])

    def release(self) -> None:
        """Give back all memory of the graphs, a GPU's as well."""
        self.decoder.release()
        self._vision = None

    def identity(self) -> str:
        """Tells what these graphs compute from what others do, across processes."""
        paths = [*self.paths.values(), *([self.prefill_path] if self.prefill_path else [])]
        parts = [part for path in sorted(paths) for part in self._bundle.fingerprint(path)]
        return hashlib.sha256("\n".join([ort.__version__, *parts]).encode()).hexdigest()

    def _load_decoder(self) -> DecoderSessions:
        decoder = self._load(DECODER, self.paths[DECODER.stem])
        prefill = self._load(DECODER, self.prefill_path) if self.prefill_path else None
        if prefill and _form_of_states(prefill) != _form_of_states(decoder):
            raise SettingError(
                f"{self.prefill_path} keeps keys and values in another form than {self.variant}'s decoder; take "
                "two variants with -kv8, "
                "quantized with the same images, two with fp16, or two with neither"
            )
        embed = self._load(EMBED_TOKENS, self.paths[EMBED_TOKENS.stem])
        return DecoderSessions(decoder, embed, prefill, self.execution.on_gpu and self._all_on_device(decoder, embed))

    def _all_on_device(self, decoder: ort.InferenceSession, embed: ort.InferenceSession) -> bool:
        """Whether nothing of the decode loop is left to the CPU; what is, the user is told."""
        found = []
        for graph, session in ((DECODER, decoder), (EMBED_TOKENS, embed)):
            path = self.paths[graph.stem]
            found.append(left_to_cpu(session, path))
            if said := check_placement(found[-1], path, strict=self._strict_placement):
                _log.warning("lfm-edge: %s", said)
        return found == [[], []]

    @contextmanager
    def failures_are_ours(self) -> Iterator[None]:
        """As the function, and where GPU memory runs out, the sizes."""
        try:
            with failures_are_ours(self._bundle.folder):
                yield
        except BundleError as e:
            if self.execution.on_gpu and is_full(_reason(e.__cause__)):
                raise full(self.paths.values(), _reason(e.__cause__)) from e
            raise

    def _load(self, graph: Graph, path: Path) -> ort.InferenceSession:
        started = time.perf_counter()
        try:
            session = self._best(graph, path)
        except BundleError as e:
            if self.execution.on_gpu and is_of_a_gpu(_reason(e.__cause__)):
                raise self._explained(_reason(e.__cause__), path) from e
            raise
        self.load_ms[path.name] = (time.perf_counter() - started) * 1e3
        return session

    def _say_unprepared(self, note: str) -> None:
        """Once: what was prepared for one graph and does not fit, mostly does not for the others."""
        if not self._said_unprepared:
            prefill = f" --prefill {self.prefill}" if self.prefill else ""
            _log.warning(
                "lfm-edge: %s; run: lfm-edge prepare %s --variant %s%s",
                note,
                self._bundle.folder,
                self.variant,
                prefill,
            )
        self._said_unprepared = True

    def _best(self, graph: Graph, path: Path) -> ort.InferenceSession:
        """The prepared form where it fits and works, else the graph as it is."""
        if graph is EMBED_TOKENS and not self.execution.on_gpu:
            return load_session(path, graph, Execution(1))  # a table look-up: neither threads nor packed weights
        if self._prepared and not self.execution.on_gpu:  # packed for the processor, and with its casts in it
            found = find(self._bundle, path, verify=self._verify)
            if found.note:
                self._say_unprepared(found.note)
            if found.path != path:
                try:
                    session = load_session(found.path, graph, self.execution)
                except BundleError as e:
                    self._say_unprepared(f"{found.path.parent} is not used: {e}")
                else:
                    return session
        self._unprepared.add(path.name)
        return load_session(path, graph, self.execution)


def _engines(bundle: Bundle, vision: Path) -> Path:
    """Where TensorRT keeps what it made of these weights: it tells engines apart by names and shapes alone."""
    made_of = hashlib.sha256("\n".join(bundle.fingerprint(vision)).encode()).hexdigest()[:12]
    return folder_of(bundle.folder) / f"tensorrt-{made_of}"


def _most_patches(images: ImageSettings, profile: Profile) -> int:
    tokens = max(images.max_image_tokens, profile.max_image_tokens or 0)
    return max(tokens * images.downsample_factor**2, (images.tile_size // images.encoder_patch_size) ** 2)


def _form_of_states(decoder: ort.InferenceSession) -> tuple[Any, ...]:
    """What two decoders must share to go on with each other's states: their types, and the scales of int8 ones."""
    types = sorted((i.name, i.type) for i in decoder.get_inputs() if i.name.startswith("past_"))
    return decoder.get_modelmeta().custom_metadata_map.get(KV_SCALES), *types


def _missing_memory(paths: Sequence[Path]) -> tuple[int, int] | None:
    """(MiB that graphs take, MiB available) where the first is more. Packed weights are about as large as the files."""
    data = (path.with_name(f"{path.name}_data") for path in paths)
    wanted = int(sum(path.stat().st_size for path in data if path.exists()) * _PACKED)
    available = psutil.virtual_memory().available
    return (wanted >> 20, available >> 20) if wanted > available else None


def load_session(path: Path, graph: Graph, execution: Execution) -> ort.InferenceSession:
    """Load one graph and check it against its contract; see open_session."""
    try:
        session = open_session(path, execution, graph=graph)
    except BundleError as e:
        if not (execution.on_gpu and execution.cuda_graphs and cannot_be_captured(e)):
            raise
        _log.warning("lfm-edge: %s is run without CUDA graphs: %s", path, _reason(e.__cause__))
        session = open_session(path, replace(execution, cuda_graphs=False), graph=graph)
    graph.check(path, (i.name for i in session.get_inputs()), (o.name for o in session.get_outputs()))
    return session


def _in_utf8(path: Path) -> str:
    """A path as onnxruntime takes it, in UTF-8 whatever the locale (in the POSIX one Python has read its bytes as
    something else).
    """
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise BundleError(f"{str(path)!a} is no path in UTF-8, which onnxruntime needs; rename the folder") from e


def open_session(
    path: Path, execution: Execution, *, graph: Graph = VISION_ENCODER, save_as: Path | None = None
) -> ort.InferenceSession:
    """Load a graph file.

    Args:
        path: the graph.
        execution: how it is run.
        graph: which it is; on a GPU they are run differently.
        save_as: also write the graph as optimized here, with its packed weights.
    """
    options = execution.options()
    if save_as:
        options.optimized_model_filepath = _in_utf8(save_as)
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{save_as.name}_data"
        )
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    providers = provider_options(
        execution.providers,
        graph,
        cuda_graphs=execution.cuda_graphs,
        engines=execution.engines,
        most_patches=execution.most_patches,
    )
    with failures_are_ours(path):
        # Its own falling back prints, and at a run goes on silently.
        session = ort.InferenceSession(_in_utf8(path), options, providers=providers, enable_fallback=0)
    if (
        providers[0][0] not in session.get_providers()
    ):  # onnxruntime goes on with the next one, and says why on stderr at most
        raise unusable(path, providers[0][0])
    return session
