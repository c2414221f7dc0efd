"""What a run over images writes, wherever it lies: records, of which the last of a path counts, and beside them
NAME.settings.json, which says what all of them were asked.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.files import to_json
from lfm_runtime.formats.manifest import file_hash

_KEYS = ("path", "sha256", "size", "modified", "settings")
_KINDS: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "sha256": (str, NoneType),
    "size": (int, NoneType),
    "modified": (int, float, NoneType),
    "settings": (str,),
    "text": (str,),
    "error": (str,),
    "fields": (dict, NoneType),
    "probabilities": (dict,),
    "worker": (dict,),
}


_SHOWN = 60


class JournalError(EdgeError):
    """The output cannot be used: the message says why, and what to do."""


class Known(NamedTuple):
    """What is kept in memory of a record: enough to tell whether its image has changed."""

    size: int | None
    modified: float | None  # seconds since 1970
    failed: bool


class Output(ABC):
    """An open output. Only one thread writes."""

    def __init__(self, name: str, settings: str) -> None:
        """`name`: as messages name it; `settings`: the hash that records carry."""
        self.name, self.settings = name, settings
        self.records: dict[str, Known] = {}  # by path
        self._others = False  # whether records of other settings are there
        self._settings: dict[str, Any] = {"tables": {}, "texts": {}}

    @abstractmethod
    def key(self, path: str) -> str:
        """How records name an image."""

    @abstractmethod
    def write(self, record: dict[str, Any]) -> str:
        """Write a record, whole or not at all; returns "", or what the system says where there is no room for it.

        Raises:
            JournalError: it cannot be written for another reason.
        """

    @abstractmethod
    def whole_records(self) -> Iterator[dict[str, Any]]:
        """The record of every path, in the order in which they were written."""

    @abstractmethod
    def _read_settings(self) -> dict[str, Any]:
        """What NAME.settings.json says; {} where it is not there. Raises JournalError where it is damaged."""

    @abstractmethod
    def _write_settings(self, text: str) -> None: ...

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings; write down those of a new file."""
        place = f"{self.name}.settings.json"
        before: dict[str, Any] = {}
        try:
            before = self._read_settings()
            ours = not before or "weights" in before
        except JournalError:
            ours = False
        if not ours and not self.records:
            raise JournalError(f"{place} exists, and lfm-edge caption did not write it; choose another output")
        if not ours:  # beside records of ours: it is damaged, and says nothing
            before = {}
        if not self._others:
            kept = {name: before.get(name, {}) if self.records else {} for name in ("tables", "texts")}
            self._settings = {**settings, **kept}
            if not self.records or not before:
                self._write_settings(to_json(self._settings, indent=1) + "\n")
            return
        unlike = [text for name, now in settings.items() for text in _unlike(name, before.get(name), _plain(now))]
        if not before:
            unlike = []
        silent = f"{place.rsplit('/', 1)[-1]} does not say which"
        raise JournalError(
            f"{self.name} was made with other settings ({'; '.join(unlike) or silent}); choose another output, or give "
            "the settings of the run before"
        )

    def wrote_table(self, path: Path) -> bool:
        """Whether a table is as a run of this output wrote it."""
        known = self._settings["tables"]
        return isinstance(known, dict) and known.get(self.key(str(path))) == file_hash(path)

    def note_table(self, path: Path) -> None:
        """Remember a table that was written."""
        known = self._settings["tables"]
        self._settings["tables"] = {**(known if isinstance(known, dict) else {}), self.key(str(path)): file_hash(path)}
        self._write_settings(to_json(self._settings, indent=1) + "\n")

    @property
    def texts(self) -> dict[str, str]:
        """Hashes of texts beside images that are of earlier records than the last, by the names that records have."""
        known = self._settings["texts"]
        return dict(known) if isinstance(known, dict) else {}

    def note_texts(self, texts: Mapping[str, str]) -> None:
        """Remember these."""
        if texts != self.texts:
            self._settings["texts"] = dict(texts)
            self._write_settings(to_json(self._settings, indent=1) + "\n")

    def _note(self, record: Mapping[str, Any]) -> None:
        self.records[record["path"]] = Known(record["size"], record["modified"], "error" in record)


def last_of_each(read: Callable[[], Iterable[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The last record of every path, of records that are read twice: they need not fit the memory."""
    last = {record["path"]: n for n, record in enumerate(read())}
    for n, record in enumerate(read()):
        if last[record["path"]] == n:
            yield record


def _unlike(name: str, before: Any, now: Any) -> Iterator[str]:
    """In words, what differs in a setting; of settings in settings those alone that differ."""
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            yield from _unlike(f"{name}.{key}", before.get(key), now.get(key))
        return
    texts = [repr(one) if isinstance(one, str) else str(one) for one in (before, now)]
    yield f"{name}: {_shown(*texts)}, now {_shown(*reversed(texts))}"


def _shown(text: str, other: str) -> str:
    """A text, of a long one what begins shortly before the two differ."""
    first = next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    begin = max(0, first - 20) if first > _SHOWN // 2 else 0
    cut = text[begin : begin + _SHOWN]
    return f"{'…' * (begin > 0)}{cut}{'…' * (begin + _SHOWN < len(text))}"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def parsed(line: bytes) -> dict[str, Any] | None:
    """A record; None for what is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or any(key not in record for key in _KEYS):
        return None
    return record if all(isinstance(record[k], kinds) for k, kinds in _KINDS.items() if k in record) else None
