"""Writing what prepared.py reads: a graph as onnxruntime optimizes it here, weights as its kernels want them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.info import DecoderInfo
from lfm_runtime.engine.execution import Execution
from lfm_runtime.engine.loader import load_session
from lfm_runtime.engine.ort_release import onnxruntime_is
from lfm_runtime.engine.prepared import NOTE, folder_of
from lfm_runtime.errors import BundleError
from lfm_runtime.formats.contract import DECODER, VISION_ENCODER, GraphSpec
from lfm_runtime.formats.edges import fed
from lfm_runtime.formats.files import check_room, to_json
from lfm_runtime.formats.manifest import file_hash
from lfm_runtime.formats.writer import replacing

PREPARED = (VISION_ENCODER, DECODER)
"""The embedding table is mapped as it is: one row is read per token."""
_FIRST_VERSION = "1.23"  # that saves packed weights
_GROWTH = 2.6  # what is written, against the graph's weights: they and their packed form


def prepare(bundle: Bundle, graph: GraphSpec, source: Path) -> Path:
    """Write the prepared form of one graph and check that it computes the same. Returns its folder.

    Raises:
        BundleError: onnxruntime is too old, the disk too full or read-only, or the results differ; what was there
            stays.
    """
    if not onnxruntime_is(_FIRST_VERSION):
        raise BundleError(
            f"onnxruntime {ort.__version__} cannot keep packed weights; prepare needs {_FIRST_VERSION} or later"
        )
    place = folder_of(bundle.folder) / source.stem
    _check_ours(place)
    check_space(bundle, [source])
    with replacing(place, check=_check_ours, elsewhere=False) as new:
        unprepared = load_session(source, graph, Execution(1), save_as=new / source.name)
        if not _same(
            unprepared,
            load_session(new / source.name, graph, Execution(1)),
            _example(bundle, source, graph, unprepared),
        ):
            raise BundleError(
                f"{source} gives different results when prepared with onnxruntime {ort.__version__}; it stays "
                "unprepared"
            )
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in sorted(new.iterdir())}
        (new / NOTE).write_text(
            to_json({"source": bundle.fingerprint(source), "files": files}, indent=2) + "\n", encoding="utf-8"
        )
    return place


def check_space(bundle: Bundle, sources: Sequence[Path]) -> None:
    """Raise BundleError where the disk has no room to prepare these graphs one after the other, each of which replaces
    its earlier form.
    """
    needed = grown = 0
    for source in sources:
        earlier = (folder_of(bundle.folder) / source.stem).glob("*")
        needed = max(needed, grown + space_needed(source))
        grown += space_needed(source) - sum(file.stat().st_size for file in earlier)
    what = sources[0].name if len(sources) == 1 else f"{len(sources)} graphs"
    check_room(bundle.folder.resolve().parent, needed, f"preparing {what}", BundleError)


def space_needed(source: Path) -> int:
    """Return how many bytes the prepared form of a graph may take."""
    weights = source.with_name(f"{source.name}_data")
    return int((weights.stat().st_size if weights.exists() else 0) * _GROWTH)


def _check_ours(place: Path) -> None:
    if place.parents[1].exists() and not place.parents[1].is_dir():
        raise BundleError(f"{place.parents[1]} is a file; move it away: prepared graphs are written there")
    if place.exists() and not (place / NOTE).exists():
        raise BundleError(f"{place} was not made by lfm-edge prepare; move it away")


def _example(bundle: Bundle, source: Path, graph: GraphSpec, session: ort.InferenceSession) -> dict[str, NDArray[Any]]:
    """Return small inputs of the graph's names, types and ranks, for one run."""
    rng = np.random.default_rng(0)
    if graph is VISION_ENCODER:
        values: dict[str, NDArray[Any]] = {
            "pixel_values": rng.uniform(-1, 1, (1, 16, 768)),
            "pixel_attention_mask": np.ones((1, 16)),
            "spatial_shapes": np.array([[4, 4]]),
        }
    else:
        info = DecoderInfo.of(session, source, bundle.facts)
        values = {
            "inputs_embeds": rng.standard_normal((1, 3, info.hidden)) * 0.02,
            "attention_mask": np.ones((1, 3)),
            "position_ids": np.arange(3)[None],
            **info.constants,
            **{state.name: np.zeros(state.shape, state.dtype) for state in info.states},
        }
    return fed(session, values)


def _same(a: ort.InferenceSession, b: ort.InferenceSession, feeds: Mapping[str, NDArray[Any]]) -> bool:
    return all(
        np.array_equal(x, y) or np.allclose(x, y, rtol=1e-4, atol=1e-4)
        for x, y in zip(a.run(None, dict(feeds)), b.run(None, dict(feeds)), strict=True)
    )
