"""onnxruntime sessions are created here and nowhere else: which graphs of a bundle, from which files, when, and for how long."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import onnxruntime as ort
import psutil
from lfm_profiles import default_threads
from onnxruntime.capi import onnxruntime_pybind11_state

from lfm_runtime.bundle import Bundle
from lfm_runtime.contract import DECODER, EMBED_TOKENS, KV8, KV_SCALES, VISION_ENCODER, Graph
from lfm_runtime.decoder import Decoder, DecoderSessions
from lfm_runtime.errors import BundleError, SettingError
from lfm_runtime.prepared import find

_log = logging.getLogger(__name__)

_ERROR_SEVERITY = 3
_MOST_THREADS = 1024
_PACKED = 1.2  # what graphs take in memory, against their weights' files: 4-bit scales become fp32, and a prompt is worked on
# onnxruntime's exceptions share no base class of their own; these are all of them.
_FAILURES = tuple(c for c in vars(onnxruntime_pybind11_state).values() if isinstance(c, type) and issubclass(c, Exception))


@contextmanager
def failures_are_ours(what: object) -> Iterator[None]:
    """An exception of onnxruntime becomes a BundleError about `what`, in one line."""
    try:
        yield
    except _FAILURES as e:
        reason = " ".join(str(e).split())[:300]
        raise BundleError(
            f"{what} does not work with onnxruntime {ort.__version__} ({reason}); check it with --verify, or export it again"
        ) from e


def onnxruntime_is(version: str) -> bool:
    """Whether the onnxruntime here is of this version or a later one."""
    here, wanted = ([int(n) for n in v.split(".")[:2]] for v in (ort.__version__, version))
    return here >= wanted


class Graphs:
    """The graphs of one variant of a bundle, loaded all at once, or with `low_memory` one stage at a time."""

    def __init__(
        self, bundle: Bundle, variant: str | None, *, prefill: str | None = None, threads: int | None = None, low_memory: bool = False,
        prepared: bool = True, verify: bool = False,
    ) -> None:  # fmt: skip
        """Nothing is loaded yet. `prepared`: use what `lfm-edge prepare` wrote; `verify`: hash all of it before.

        Raises:
            BundleError: the bundle lacks a variant.
            SettingError: impossible threads; a prefill variant that is the variant itself, or beside low_memory.
        """
        if threads is not None and not 1 <= threads <= _MOST_THREADS:
            raise SettingError(f"threads {threads} is impossible; allowed: 1 up to the machine's cores")
        if prefill and low_memory:
            raise SettingError("prefill needs a second decoder in memory, low_memory allows one; leave one out")
        self.variant, self.paths = bundle.graphs(variant)
        if prefill == self.variant:
            raise SettingError(f"prefill {prefill} has no effect beside the variant {prefill}; leave it out")
        self.prefill_path = bundle.graphs(prefill)[1][DECODER.stem] if prefill else None
        if self.prefill_path and (short := _missing_memory([*self.paths.values(), self.prefill_path])):
            _log.warning("lfm-edge: prefill %s is left out: with it the graphs take about %d MiB, %d are available", prefill, *short)
            self.prefill_path = None
        for path in (*self.paths.values(), *([self.prefill_path] if self.prefill_path else [])):
            wanted = bundle.min_onnxruntime.get(path, "0.0")
            if not onnxruntime_is(wanted):
                raise BundleError(f"{path} needs onnxruntime {wanted}, this is {ort.__version__}; update it, or take another variant")
        self.threads = threads or default_threads()
        self.low_memory = low_memory
        self.decoder = Decoder(self._load_decoder, self.paths[DECODER.stem], shrink=low_memory)
        self._bundle, self._prepared, self._verify = bundle, prepared, verify
        self._vision: ort.InferenceSession | None = None

    def load(self) -> None:
        """Load everything, the encoder beside the decoder; with low_memory nothing yet."""
        if self.low_memory:
            return
        with ThreadPoolExecutor(1) as other:
            vision = other.submit(self._load, VISION_ENCODER, self.paths[VISION_ENCODER.stem])
            self.decoder.sessions  # noqa: B018
            self._vision = vision.result()

    def vision(self) -> ort.InferenceSession:
        """The vision encoder. With low_memory the decoder leaves memory first, and the encoder does when the caller lets go of it."""
        if self.low_memory:
            self.decoder.release()
        return self._vision or self._load(VISION_ENCODER, self.paths[VISION_ENCODER.stem])

    def identity(self) -> str:
        """Tells what these graphs compute from what others do, across processes."""
        paths = [*self.paths.values(), *([self.prefill_path] if self.prefill_path else [])]
        parts = [part for path in sorted(paths) for part in self._bundle.fingerprint(path)]
        return hashlib.sha256("\n".join([ort.__version__, *parts]).encode()).hexdigest()

    def _load_decoder(self) -> DecoderSessions:
        decoder = self._load(DECODER, self.paths[DECODER.stem])
        prefill = self._load(DECODER, self.prefill_path) if self.prefill_path else None
        if prefill and _kv_scales(prefill) != _kv_scales(decoder):
            raise SettingError(
                f"{self.prefill_path} keeps keys and values in another form than {self.variant}'s decoder; take two variants with {KV8}, "
                "quantized with the same images, or two without"
            )
        return DecoderSessions(decoder, load_session(self.paths[EMBED_TOKENS.stem], EMBED_TOKENS, 1), prefill)  # a table look-up: 1 thread

    def _load(self, graph: Graph, path: Path) -> ort.InferenceSession:
        """The prepared form where it fits and works, else the graph as it is."""
        if self._prepared:
            found = find(self._bundle, path, verify=self._verify)
            if found.note:
                _log.warning("lfm-edge: %s", found.note)
            if found.path != path:
                try:
                    return load_session(found.path, graph, self.threads)
                except BundleError as e:
                    _log.warning("lfm-edge: %s is not used: %s; run: lfm-edge prepare", found.path.parent, e)
        return load_session(path, graph, self.threads)


def _kv_scales(decoder: ort.InferenceSession) -> str | None:
    found: str | None = decoder.get_modelmeta().custom_metadata_map.get(KV_SCALES)
    return found


def _missing_memory(paths: Sequence[Path]) -> tuple[int, int] | None:
    """(MiB that graphs take, MiB available) where the first is more. Packed weights are about as large as the files."""
    data = (path.with_name(f"{path.name}_data") for path in paths)
    wanted = int(sum(path.stat().st_size for path in data if path.exists()) * _PACKED)
    available = psutil.virtual_memory().available
    return (wanted >> 20, available >> 20) if wanted > available else None


def load_session(path: Path, graph: Graph, threads: int, *, packed: bool = True) -> ort.InferenceSession:
    """Load one graph and check it against its contract; see open_session."""
    session = open_session(path, threads, packed=packed)
    graph.check(path, (i.name for i in session.get_inputs()), (o.name for o in session.get_outputs()))
    return session


def exact_products(options: ort.SessionOptions) -> None:
    """On x86 without VNNI, int8 products add pairs in 16 bits, which overflow where weights and inputs are large (a demo encoder falls
    from 0.999 to 0.96 cosine). With this setting onnxruntime uses another kernel there: right, and 19 % slower. No effect elsewhere.
    """
    options.add_session_config_entry("session.x64quantprecision", "1")


def open_session(path: Path, threads: int, *, packed: bool = True, save_as: Path | None = None) -> ort.InferenceSession:
    """Load a graph file on the CPU.

    Args:
        path: the graph.
        threads: of each operator.
        packed: make the copy of the weights that kernels are fast with; else they are used as the file has them, mapped.
        save_as: also write the graph as optimized here, with that copy.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERROR_SEVERITY
    # Every step has new shapes (context grows by one), so a memory pattern would be planned and kept for each.
    options.enable_mem_pattern = False
    exact_products(options)
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if save_as:
        options.optimized_model_filepath = str(save_as)
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{save_as.name}_data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    with failures_are_ours(path):
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
