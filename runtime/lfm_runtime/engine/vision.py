"""Images → features: what a view costs, a view at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm_runtime.answer.reply import Opened
from lfm_runtime.decode.cache import Cache
from lfm_runtime.engine.gpu import VIEWS_AT_ONCE
from lfm_runtime.engine.sessions import Sessions
from lfm_runtime.formats.contract import VISION_ENCODER
from lfm_runtime.formats.edges import check_patches, fed, image_features
from lfm_runtime.images.layout import views_of_one_size
from lfm_runtime.report import Report

Progress = Callable[[int, int], None]
"""Called with (views encoded, views in all) before each view and after the last."""


def encoding(
    sessions: Sessions, cache: Cache | None, opened: Sequence[Opened], report: Report, progress: Progress | None = None
) -> Generator[None, None, NDArray[np.float32]]:
    """Image features [image tokens, H] of all views of all images in order, a view each time, on a GPU those of one
    size. Each view runs alone and unpadded.
    """
    features: list[NDArray[np.float32] | None] = [
        cache.features(image.key, image.layout.tokens) if cache else None for image in opened
    ]
    todo = [i for i, found in enumerate(features) if found is None]
    total = sum(len(opened[i].layout.views) for i in todo)
    done = iter(range(total + 1))

    def tell(views: int) -> None:
        for _ in range(views):
            if progress and total:
                progress(next(done), total)

    if todo:
        with report.stage("load"):
            vision = sessions.vision()
        for i in todo:
            parts = []
            for part in _encode_views(sessions, vision, opened[i], report, tell):
                parts.append(part)
                yield
            features[i] = made = np.concatenate(parts)
            if cache:
                cache.keep_features(opened[i].key, made)
    tell(1)
    return np.concatenate([f for f in features if f is not None]) if features else np.empty((0, 0), np.float32)


def _encode_views(
    sessions: Sessions, vision: Any, opened: Opened, report: Report, tell: Callable[[int], None]
) -> Iterator[NDArray[np.float32]]:
    output = [str(VISION_ENCODER.output([o.name for o in vision.get_outputs()]))]
    cut = opened.views()
    at_once = VIEWS_AT_ONCE if sessions.execution.on_gpu else 1
    for views in views_of_one_size(opened.layout.views, at_once):
        tell(len(views))
        with report.stage("preprocess"):
            patches = np.stack([next(cut) for _ in views])
        with report.stage("vision"):
            feeds: dict[str, NDArray[Any]] = {
                "pixel_values": patches,
                "pixel_attention_mask": np.ones(patches.shape[:2], np.int64),
                "spatial_shapes": np.array([[view.rows, view.columns] for view in views], np.int64),
            }
            check_patches(vision, patches)
            (found,) = vision.run(output, fed(vision, feeds))
        yield image_features(found, sum(view.tokens for view in views))
