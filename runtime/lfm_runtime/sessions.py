"""onnxruntime sessions are created here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from lfm_runtime.contract import DECODER, EMBED_TOKENS, VISION_ENCODER, Graph
from lfm_runtime.errors import BundleError

_ERROR_SEVERITY = 3


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
        _load(graphs[VISION_ENCODER.stem], VISION_ENCODER, threads),
        _load(graphs[EMBED_TOKENS.stem], EMBED_TOKENS, 1),  # a table look-up
        _load(graphs[DECODER.stem], DECODER, threads),
        graphs[DECODER.stem],
    )


def _load(path: Path, graph: Graph, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERROR_SEVERITY
    # Every step has new shapes (context grows by one), so a memory pattern would be planned and kept for each.
    options.enable_mem_pattern = False
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's exceptions share no public base class
        reason = " ".join(str(e).split())[:300]
        raise BundleError(
            f"{path} cannot be loaded by onnxruntime {ort.__version__} ({reason}); copy or export the bundle again"
        ) from e
    graph.check(path, (i.name for i in session.get_inputs()), (o.name for o in session.get_outputs()))
    return session
