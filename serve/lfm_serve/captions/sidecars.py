"""A text file beside each image, as tools for training read captions."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lfm_runtime.errors import EdgeError, SettingError, counted
from lfm_runtime.formats.files import to_write, write_whole

from lfm_serve.jsonl import FULL

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def check_folders(images: Iterable[str]) -> None:
    """Before anything is answered, whether texts can be written where images have none.

    Raises:
        SettingError: into a folder no file can be written.
    """
    known: set[Path] = set()
    for image in map(Path, images):
        if image.parent in known:
            continue
        writable = os.access(image.parent, os.W_OK | os.X_OK)
        if not writable and not os.path.exists(image.with_suffix(".txt")):  # noqa: PTH110  (False where nobody may look)
            do = to_write(image.parent, "the images")
            raise SettingError(
                f"--sidecar writes beside the images, and {image.parent} is not writable; {do}, or write the texts "
                "elsewhere with --table TEXTS.csv"
            )
        if writable:
            known.add(image.parent)


class Sidecars:
    """Writes NAME.txt beside NAME.jpg; a file that an earlier run did not write stays."""

    def __init__(
        self,
        records: Iterable[Mapping[str, Any]],
        older: Mapping[str, str],
        images: Mapping[str, str],
        warn: Callable[[str], None],
        *,
        force: bool,
    ) -> None:
        """`records`: of earlier runs, whose texts are ours, and are written where a run ended before it did; `older`:
        hashes of texts of ours that could not be replaced then, by the names that records have; `images`: the paths of
        those that are asked about now, by the same; `force`: replace whatever is there.

        Raises:
            SettingError: there is no room for a text of an earlier run.
        """
        self._force, self._warn = force, warn
        self._ours: dict[str, str] = {}  # name → hash of its text
        self.older = dict(older)
        """Hashes of texts of ours that could not be replaced, by the names that records have."""
        self._of: dict[str, str] = {}  # text file → the image that it is of
        self._told: Counter[tuple[Path, str]] = Counter()  # what was said of a folder, of which there is one line
        self.failed: set[str] = set()
        """Images beside which there is no text, as the system did not let us write it."""
        for record in records:
            if "text" in record:
                self._ours[record["path"]] = _digest(record["text"])
                path = images.get(record["path"])
                if path and (full := self.write(path, record)):
                    raise SettingError(f"{full}; free some space")

    def write(self, path: str, record: Mapping[str, Any]) -> str:
        """Write the text of a record beside its image; where that cannot be, warn. Returns "", or what the system says
        where there is no room for it.
        """
        if "text" not in record:
            return ""
        place, text = Path(path).with_suffix(".txt"), record["text"]
        other = self._of.setdefault(str(place), path)
        self.failed.add(path)
        not_of = f"the text of {path} is not written"
        try:
            if other != path or place == Path(path):
                self._say(place, "taken", f"{not_of}: {place} is {'that of ' * (other != path)}{other}")
            elif place.is_symlink():
                self._say(place, "a link", f"{place} is a link and stays; {not_of}")
            elif place.exists() and not place.is_file():
                self._say(place, "no file", f"{place} is no plain file and stays; {not_of}; move it away")
                return ""
            elif place.exists() and self._same(place, text):
                pass
            elif self._force or not place.exists() or self._is_ours(place, record["path"]):
                write_whole(place, text + "\n")
            else:
                why = "has a text that is in no record of this output, and stays; --force replaces it"
                self._say(place, "another's", f"{place} {why}")
                self.failed.discard(path)
                return ""
        except (OSError, EdgeError) as e:
            if record["path"] in self._ours:
                self.older.setdefault(record["path"], self._ours[record["path"]])
            cause = e if isinstance(e, OSError) else e.__cause__
            number, why = (cause.errno, cause.strerror or "") if isinstance(cause, OSError) else (None, str(e))
            if number in FULL:
                return f"{place} cannot be written: {why}"
            do = f"; {to_write(place.parent, 'the images')}" if number in _DENIED else ""
            self._say(place, f"failed: {why}", f"{place} cannot be written: {why}{do}")
            return ""
        self.failed.discard(path)
        self.older.pop(record["path"], None)
        self._ours[record["path"]] = _digest(text)
        return ""

    def end(self) -> None:
        """Say how many more there were of what was said once for a folder."""
        for (folder, _), times in self._told.items():
            if times > 1:
                self._warn(f"{folder}: the same of {counted(times - 1, 'other text')}")
        if self.failed:
            texts = counted(len(self.failed), "text")
            self._warn(
                f"{texts} could not be written beside the images; the same command writes them once that is mended"
            )

    def _say(self, place: Path, kind: str, what: str) -> None:
        """Warn once of each kind in a folder: there may be 100,000."""
        self._told[place.parent, kind] += 1
        if self._told[place.parent, kind] == 1:
            self._warn(what)

    def _same(self, place: Path, text: str) -> bool:
        return place.read_bytes().removesuffix(b"\n") == text.encode("utf-8", "surrogatepass")

    def _is_ours(self, place: Path, key: str) -> bool:
        there = hashlib.sha256(place.read_bytes().removesuffix(b"\n")).hexdigest()
        return there in (self._ours.get(key), self.older.get(key))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
