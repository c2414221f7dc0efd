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
    sessions: Sessions,
    cache: Cache | None,
    opened: Sequence[Opened],
    report: Report,
    progress: Progress | None = None,
    *,
    skip: int = 0,
) -> Generator[None, None, NDArray[np.float32]]:
    """Image features [image tokens, H] of all views of all images in order, but for the first `skip`: a view each time,
    on a GPU those of one size. Each view runs alone and unpadded.
    """
    opened = [image.cut() for image in opened] if cache else opened  # whose views have keys
    features: list[NDArray[np.float32] | None] = []
    todo: list[tuple[Opened, list[int], int]] = []  # images, their views to be encoded, where their features begin
    for image in opened:
        begin, views = len(features), image.layout.views
        wanted = range(min(skip, len(views)), len(views))
        skip -= len(views) - len(wanted)
        keys = image.cut().keys if cache else ()
        for known in keys[: wanted.start]:
            assert cache
            cache.touch(known)  # the decoder has read them: should it have to again, they are there
        features += [cache.features(keys[n], views[n].tokens) if cache else None for n in wanted]
        if missing := [n for n in wanted if features[begin + n - wanted.start] is None]:
            todo.append((image, missing, begin - wanted.start))
    total = sum(len(missing) for _, missing, _ in todo)
    report.encoded_tiles += total
    done = iter(range(total + 1))

    def tell(views: int) -> None:
        for _ in range(views):
            if progress and total:
                progress(next(done), total)

    if todo:
        with report.loading(begun=not sessions.execution.low_memory):
            vision = sessions.vision()
        for image, missing, begin in todo:
            for together in _encode_views(sessions, vision, image, missing, report, tell):
                for n, made in together:
                    features[begin + n] = made
                    if cache:
                        cache.keep_features(image.cut().keys[n], made)
                yield
    tell(1)
    return np.concatenate([f for f in features if f is not None]) if features else np.empty((0, 0), np.float32)


def _encode_views(
    sessions: Sessions, vision: Any, opened: Opened, wanted: Sequence[int], report: Report, tell: Callable[[int], None]
) -> Iterator[list[tuple[int, NDArray[np.float32]]]]:
    """Numbers of views and their features [tokens, H], of those that run together."""
    output = [str(VISION_ENCODER.output([o.name for o in vision.get_outputs()]))]
    cut, numbers = opened.patches(wanted), iter(wanted)
    at_once = VIEWS_AT_ONCE if sessions.execution.on_gpu else 1
    for views in views_of_one_size([opened.layout.views[n] for n in wanted], at_once):
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
        tokens = [view.tokens for view in views]
        parts = np.split(image_features(found, sum(tokens)), np.cumsum(tokens)[:-1])
        yield [(next(numbers), part) for part in parts]
