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
        self, records: Iterable[Mapping[str, Any]], base: Path, warn: Callable[[str], None], *, force: bool
    ) -> None:
        """`records`: of earlier runs, whose texts are ours, and are written where a run ended before it did; `base`:
        what their paths are relative to; `force`: replace whatever is there.
        """
        self._ours: dict[str, str] = {}
        self._force = force
        for record in records:
            if "text" in record:
                self._ours[record["path"]] = _digest(record["text"])
                image = base / record["path"]
                if image.exists() and not image.with_suffix(".txt").exists():
                    self.write(str(image), record, warn)

    def write(self, path: str, record: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        """Write the text of a record beside its image; where that cannot be, warn."""
        if "text" not in record:
            return
        place, text = Path(path).with_suffix(".txt"), record["text"]
        try:
            if not self._force and place.exists() and not self._is_ours(place, record["path"], text):
                warn(f"{place} is not of lfm-edge caption and stays; --force replaces it")
                return
            write_whole(place, text + "\n")
        except (OSError, EdgeError) as e:
            warn(f"{place} is not written: {e}")
        self._ours[record["path"]] = _digest(text)

    def _is_ours(self, place: Path, key: str, text: str) -> bool:
        there = place.read_bytes().removesuffix(b"\n")
        return hashlib.sha256(there).hexdigest() in (self._ours.get(key), _digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
