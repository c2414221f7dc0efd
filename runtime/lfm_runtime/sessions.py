"""onnxruntime sessions are created here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state

from lfm_runtime.contract import DECODER, EMBED_TOKENS, VISION_ENCODER, Graph
from lfm_runtime.errors import BundleError

_ERROR_SEVERITY = 3
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


@dataclass(frozen=True)
class Sessions:
    """The three graphs, loaded."""

    vision: ort.InferenceSession
    embed: ort.InferenceSession
    decoder: ort.InferenceSession
    decoder_path: Path


def load_sessions(graphs: Mapping[str, Path], threads: int) -> Sessions:
    """Load a variant's graphs and check each against its contract."""
    return Sessions(
        load_session(graphs[VISION_ENCODER.stem], VISION_ENCODER, threads),
        load_session(graphs[EMBED_TOKENS.stem], EMBED_TOKENS, 1),  # a table look-up
        load_session(graphs[DECODER.stem], DECODER, threads),
        graphs[DECODER.stem],
    )


def load_session(path: Path, graph: Graph, threads: int, *, packed: bool = True) -> ort.InferenceSession:
    """Load one graph and check it against its contract. Not `packed`: weights are used where the file is mapped, no faster copy of
    them is made.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERROR_SEVERITY
    # Every step has new shapes (context grows by one), so a memory pattern would be planned and kept for each.
    options.enable_mem_pattern = False
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    with failures_are_ours(path):
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph.check(path, (i.name for i in session.get_inputs()), (o.name for o in session.get_outputs()))
    return session
