"""What is seen, and what of it is new: a frame costs what has changed since the one before."""

from __future__ import annotations

from typing import Any

import numpy as np
from lfm_runtime.answer.choice import Chosen
from lfm_runtime.answer.reply import Job
from lfm_runtime.decode.context import Context
from lfm_runtime.errors import SettingError
from lfm_runtime.images.opened import CutImage
from lfm_runtime.images.pixels import ImageLike
from lfm_runtime.model import Model
from lfm_runtime.report import Report
from numpy.typing import NDArray

from lfm_serve.asking import Asking

KEPT = 2
"""Pictures whose features are kept: the one before and this one."""
_PATCH = 16  # pixels a side
_SMALL = (64, 36)
_DIFFERENT = 12
"""Of 255: what a pixel of the small copy must differ by. A pixel of it is the mean of hundreds: noise is below 1."""


class Scene:
    """Pictures of one camera, one after the other, and questions about them.

    A view (a tile, or the whole picture small) whose pixels are those of a picture before is not encoded again, and the
    decoder goes on from where the prompt begins to differ: the views before the first one that has changed are not read
    again either. The model needs a cache with room for the views of KEPT pictures: see Setup.pictures_mib.

    scene = Scene(model)
    picture = scene.see("frame.jpg")
    print(scene.ask(picture, Asking("Is the gate open?")).text)
    """

    def __init__(self, model: Model, *, tolerance: float = 0.0) -> None:
        """`tolerance`: a view is also taken for unchanged where no 16×16 patch's mean, of any colour, differs by more,
        of 255, from that of the view that was encoded. With 0 answers, on a CPU, are those of a scene that keeps
        nothing, bit for bit.

        Raises SettingError for a tolerance that is no number from 0 to 255.
        """
        if not isinstance(tolerance, (int, float)) or not 0 <= tolerance <= 255:
            raise SettingError(f"tolerance {tolerance!r} is impossible; allowed: 0 to 255")
        self.model, self._tolerance = model, tolerance
        self._context = Context(model.decoder)  # without the cache: no copies of keys and values are kept
        self._before: CutImage | None = None

    def see(self, picture: ImageLike) -> CutImage:
        """The picture cut into views; those within the tolerance are the ones before.

        Raises:
            ImageError: it cannot be opened.
        """
        now = self.model.open(picture).cut()
        if self._tolerance and self._before and self._before.layout == now.layout:
            views = zip(self._before.pixels, now.pixels, strict=True)
            pixels = tuple(a if _alike(a, b, self._tolerance) else b for a, b in views)
            now = CutImage(now.size, now.layout, now.settings, pixels)
        self._before = now
        return now

    def ask(self, picture: CutImage, asking: Asking) -> Report | Chosen:
        """The whole answer. Raises as `Model.answer`."""
        work = asking.work(self.model, picture)
        if not isinstance(work, Job):
            return self.model.chosen(work, self._context)[0]
        answer = self.model.answering(work, self._context)
        answer.text()
        return answer.report


def small(picture: Any) -> NDArray[np.uint8]:
    """A copy [36, 64, 3] of an RGB picture, by which it is judged whether anything has changed."""
    from PIL.Image import Resampling

    return np.asarray(picture.resize(_SMALL, Resampling.BOX))


def share_changed(before: NDArray[np.uint8], now: NDArray[np.uint8]) -> float:
    """The share of a picture that differs, by two small copies."""
    differ = np.abs(before.astype(np.int16) - now).max(axis=2) > _DIFFERENT
    return float(differ.mean())


def _alike(before: NDArray[np.uint8], now: NDArray[np.uint8], tolerance: float) -> bool:
    return before is now or bool(np.abs(patch_means(before) - patch_means(now)).max() <= tolerance)


def patch_means(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The mean of every 16×16 patch, by colour: [height / 16, width / 16, 3]. What is left at the edges belongs to the
    last ones.
    """
    starts = [np.arange(0, max(side - _PATCH + 1, 1), _PATCH) for side in pixels.shape[:2]]
    sums = np.add.reduceat(np.add.reduceat(pixels, starts[0], axis=0, dtype=np.int64), starts[1], axis=1)
    rows, columns = (np.diff(np.append(s, side)) for s, side in zip(starts, pixels.shape[:2], strict=True))
    means: NDArray[np.float64] = sums / (rows[:, None, None] * columns[None, :, None])
    return means
