"""A text file beside each image, as tools for training read captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.files import write_whole


class Sidecars:
    """Writes NAME.txt beside NAME.jpg; a file that an earlier run did not write stays."""

    def __init__(
        self,
        records: Iterable[Mapping[str, Any]],
        images: Mapping[str, str],
        warn: Callable[[str], None],
        *,
        force: bool,
    ) -> None:
        """`records`: of earlier runs, whose texts are ours, and are written where a run ended before it did; `images`:
        the paths of those that are asked about now, by the names that records have; `force`: replace whatever is there.
        """
        self._force = force
        self._ours: dict[str, str] = {}  # name → hash of its text
        self._of: dict[str, str] = {}  # text file → the image that it is of
        for record in records:
            if "text" in record:
                self._ours[record["path"]] = _digest(record["text"])
                if path := images.get(record["path"]):
                    self.write(path, record, warn)

    def write(self, path: str, record: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        """Write the text of a record beside its image; where that cannot be, warn."""
        if "text" not in record:
            return
        place, text = Path(path).with_suffix(".txt"), record["text"]
        other = self._of.setdefault(str(place), path)
        try:
            if other != path or place == Path(path):
                warn(f"the text of {path} is not written: {place} is {'that of ' * (other != path)}{other}")
            elif place.is_symlink():
                warn(f"{place} is a link and stays; the text of {path} is not written")
            elif place.exists() and self._same(place, text):
                pass
            elif self._force or not place.exists() or self._is_ours(place, record["path"]):
                write_whole(place, text + "\n")
            else:
                warn(f"{place} has a text that is in no record of this output, and stays; --force replaces it")
                return
        except (OSError, EdgeError) as e:
            warn(f"{place} is not written: {e}")
        self._ours[record["path"]] = _digest(text)

    def _same(self, place: Path, text: str) -> bool:
        return place.read_bytes().removesuffix(b"\n") == text.encode("utf-8", "surrogatepass")

    def _is_ours(self, place: Path, key: str) -> bool:
        return hashlib.sha256(place.read_bytes().removesuffix(b"\n")).hexdigest() == self._ours.get(key)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
