"""A still, or a folder of them: each picture in the order of names."""

from __future__ import annotations

import os
from collections.abc import Generator
from functools import partial

from lfm_runtime.errors import SettingError
from lfm_runtime.images.pixels import open_image

from lfm_serve.cameras.sources import Frame, SourceError
from lfm_serve.captions.images import find


class Stills:
    """An image, or those of a folder, each once."""

    live, stall = False, 0.0

    def __init__(self, place: str) -> None:
        """Raises SettingError for a folder without images."""
        self.shown = self._place = place
        said: list[str] = []
        if not any(find([place], recursive=False, match=(), warn=said.append)):
            raise SettingError(said[0] if said else f"there are no images in {place}; name another folder")

    def frames(self) -> Generator[Frame, None, None]:
        """Implement Source.frames."""
        said: list[str] = []
        for number, path in enumerate(find([self._place], recursive=False, match=(), warn=said.append)):
            yield Frame(number, partial(open_image, path), os.path.basename(path))  # noqa: PTH119  (need not be UTF-8)
        if said:
            raise SourceError(said[0])

    def stop(self) -> None:
        """Implement Source.stop: nothing is waited for."""
