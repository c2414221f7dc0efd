"""onnxruntime sessions are created here and nowhere else: one graph file, loaded as an Execution says."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort

from lfm_runtime.bundle import Bundle
from lfm_runtime.engine.execution import Execution
from lfm_runtime.engine.failures import failures_are_ours, reason
from lfm_runtime.engine.gpu import cannot_be_captured, full, is_full, is_of_a_gpu, provider_options, unusable
from lfm_runtime.engine.gpu_wheel import CUDA
from lfm_runtime.engine.ort_release import onnxruntime_is
from lfm_runtime.engine.prepared import find
from lfm_runtime.errors import BundleError, OutOfMemoryError
from lfm_runtime.formats.contract import EMBED_TOKENS, GraphSpec
from lfm_runtime.formats.files import check_no_pointer
from lfm_runtime.formats.onnx_file import external_files

_log = logging.getLogger(__name__)


class Loader:
    """Loads the graphs of a variant: each in its prepared form where there is one that fits, else as it is."""

    def __init__(
        self,
        bundle: Bundle,
        execution: Execution,
        paths: Mapping[str, Path],
        advice: str,
        *,
        unpacked: Collection[Path] = (),
        verify: bool = False,
    ) -> None:
        """`paths`: of all graphs of the variant, by stem; `advice`: what prepares them; `unpacked`: those whose weights
        are used as the file has them; `verify`: hash all of what was prepared before it is used.
        """
        self.execution = execution
        self._bundle, self._paths, self._advice, self._verify = bundle, paths, advice, verify
        self._unpacked = unpacked
        self.load_ms: dict[str, float] = {}  # file → what it took, of the last time
        self.unprepared: set[str] = set()
        self._said_unprepared = False
        self._saying = threading.Lock()

    def load(self, graph: GraphSpec, path: Path) -> ort.InferenceSession:
        """One graph.

        Raises:
            BundleError, GraphContractError: it cannot be used.
            GpuError: the GPU cannot be used for it, or its memory is full.
        """
        started = time.perf_counter()
        if graph is EMBED_TOKENS and not self.execution.on_gpu:  # a table look-up: neither threads nor packed weights
            session = load_session(path, graph, Execution(1))
        elif (prepared := self._prepared(graph, path)) is not None:
            session = prepared
        else:
            self.unprepared.add(path.name)
            with self.gpu_failures(path):
                session = load_session(path, graph, self._execution_of(path))
        self.load_ms[path.name] = (time.perf_counter() - started) * 1e3
        return session

    @contextmanager
    def gpu_failures(self, path: Path) -> Iterator[None]:
        """What is about the GPU becomes a GpuError, with the sizes where its memory is full."""
        try:
            yield
        except (BundleError, OutOfMemoryError) as e:
            why = reason(e.__cause__)
            if not (self.execution.on_gpu and is_of_a_gpu(why)):
                raise
            raise (full(self._paths.values(), why) if is_full(why) else unusable(path, CUDA, why)) from e

    def _execution_of(self, path: Path) -> Execution:
        return replace(self.execution, packed=False) if path in self._unpacked else self.execution

    def _prepared(self, graph: GraphSpec, path: Path) -> ort.InferenceSession | None:
        """What was prepared for a processor, where it fits and works: its weights are packed and its casts made."""
        if not self.execution.prepared or self.execution.on_gpu:
            return None
        found = find(self._bundle, path, verify=self._verify)
        note = found.note
        if found.path != path:
            try:
                return load_session(found.path, graph, self._execution_of(path))
            except BundleError as e:
                why = reason(e.__cause__)[:200] if e.__cause__ else str(e)
                note = f"{found.path.parent} is damaged, or not for this onnxruntime, and is not used ({why})"
        with self._saying:
            if note and not self._said_unprepared:  # once: what does not fit for one mostly does not for the others
                _log.warning("lfm-edge: %s; run: %s", note, self._advice)
                self._said_unprepared = True
        return None


def load_session(
    path: Path, graph: GraphSpec, execution: Execution, *, save_as: Path | None = None
) -> ort.InferenceSession:
    """Load one graph file and check it against its contract. A GPU's provider that cannot capture its steps as a CUDA
    graph runs them uncaptured.

    Args:
        path: the graph.
        graph: which it is; on a GPU they are run differently.
        execution: how it is run.
        save_as: also write the graph as optimized here, with its packed weights.

    Raises:
        BundleError: onnxruntime cannot load it.
        GraphContractError: it is another graph.
        GpuError: onnxruntime went on without the GPU.
    """
    options = execution.options()
    if save_as:
        options.optimized_model_filepath = _in_utf8(save_as)
        for key, value in (
            ("session.save_external_prepacked_constant_initializers", "1"),
            ("session.optimized_model_external_initializers_file_name", f"{save_as.name}_data"),
            ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ):
            options.add_session_config_entry(key, value)
    providers = provider_options(execution, graph)
    try:
        with failures_are_ours(path):
            # Its own falling back prints, and at a run goes on silently.
            session = ort.InferenceSession(_in_utf8(path), options, providers=providers, enable_fallback=0)
    except BundleError as e:
        for file in (path, *(path.parent / name for name in external_files(path))):
            check_no_pointer(file, BundleError)
        if not (execution.on_gpu and execution.cuda_graphs and cannot_be_captured(e)):
            raise
        _log.warning("lfm-edge: %s is run without CUDA graphs: %s", path, reason(e.__cause__))
        return load_session(path, graph, replace(execution, cuda_graphs=False))
    if providers[0][0] not in session.get_providers():  # it goes on with the next one, and says why on stderr at most
        raise unusable(path, providers[0][0])
    graph.check(path, (i.name for i in session.get_inputs()), (o.name for o in session.get_outputs()))
    return session


def check_onnxruntime(bundle: Bundle, path: Path) -> None:
    """Raise BundleError where a graph needs a newer onnxruntime, as the manifest says."""
    wanted = bundle.min_onnxruntime(path)
    if not onnxruntime_is(wanted):
        raise BundleError(
            f"{path} needs onnxruntime {wanted}, this is {ort.__version__}; update it, or take another variant"
        )


def _in_utf8(path: Path) -> str:
    """A path as onnxruntime takes it, in UTF-8 whatever the locale (in the POSIX one Python has read its bytes as
    something else).
    """
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise BundleError(f"{str(path)!a} is not a path in UTF-8, which onnxruntime needs; rename the folder") from e
