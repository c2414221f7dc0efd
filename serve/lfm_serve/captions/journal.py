"""The JSONL file of a run: one record a line, each written whole; the last record of a path counts.

A second writer is refused by a lock on the file. A line that a killed process or a full disk has cut off is dropped
when the file is opened again, so what it was about is done again. Beside the file, NAME.settings.json says what all of
its records were asked.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.files import check_outside_bundles, check_writable, read_json_object, to_json, write_whole
from lfm_runtime.formats.manifest import file_hash

from lfm_serve.jsonl import FULL, append, json_line, locked

PROGRAM = "lfm-edge caption"
_log = logging.getLogger(__name__)
_SYNC_S = 1.0
_KEYS = ("path", "sha256", "size", "modified", "settings")


class JournalError(EdgeError):
    """The output cannot be used: the message says why, and what to do."""


class Known(NamedTuple):
    """What is kept in memory of a record: enough to tell whether its image has changed."""

    size: int | None
    modified: float | None  # seconds since 1970
    failed: bool


class Journal:
    """An open output. Only one thread writes."""

    def __init__(self, path: Path, descriptor: int, settings: str, *, remembers: bool = False) -> None:
        """`remembers`: the same image may come twice in this run, so what is written is known as well."""
        self.path, self.settings = path, settings
        self.records: dict[str, Known] = {}  # by path
        self._remembers, self._others = remembers, False
        self._settings: dict[str, Any] = {"tables": {}}
        self.superseded = 0  # records that a later one replaces
        self._descriptor = descriptor
        self._synced = time.monotonic()

    @staticmethod
    @contextmanager
    def open(path: Path, settings: Mapping[str, Any], digest: str, *, remembers: bool = False) -> Iterator[Journal]:
        """Open an output, new or to go on with; closed and synchronized at the end. `remembers`: see __init__.

        Raises:
            JournalError: it is somebody else's, damaged, written by another process now, or of other settings.
        """
        check_writable(path)
        check_outside_bundles(path)
        path = Path(os.path.abspath(path))  # noqa: PTH100  (links stay)
        journal = Journal(path, locked(path, PROGRAM, JournalError), digest, remembers=remembers)
        try:
            whole = journal._read()
            journal._check_settings(settings)
            os.ftruncate(journal._descriptor, whole)  # after all that may refuse it
            yield journal
            if journal.superseded:
                journal.compact()
        finally:
            os.fsync(journal._descriptor)
            os.close(journal._descriptor)

    def key(self, path: str) -> str:
        """How records name an image: relative to the output's folder where it lies below it, else absolute."""
        whole, base = os.path.abspath(path), str(self.path.parent)  # noqa: PTH100  (links stay)
        return os.path.relpath(whole, base) if whole.startswith(f"{base}{os.sep}") else whole

    def write(self, record: dict[str, Any]) -> str:
        """Append a record, whole or not at all; returns "", or what the system says where there is no room for it.

        Raises:
            JournalError: it cannot be written for another reason.
        """
        line = json_line(record)
        try:
            sync = time.monotonic() - self._synced > _SYNC_S
            append(self._descriptor, line, sync=sync)
            self._synced = time.monotonic() if sync else self._synced
        except OSError as e:
            if e.errno in FULL:
                return f"{self.path}: {e.strerror}"
            raise JournalError(f"{self.path} cannot be written ({e.strerror}); run again to go on") from e
        self.superseded += record["path"] in self.records
        if self._remembers:
            self._note(record)
        return ""

    def whole_records(self) -> Iterator[dict[str, Any]]:
        """The record of every path, in the order of the file."""
        last = {record["path"]: n for n, record in enumerate(_records(self.path))}
        for n, record in enumerate(_records(self.path)):
            if last[record["path"]] == n:
                yield record

    def compact(self) -> None:
        """Write the file anew without the records that later ones replace; where that fails they stay, with a warning:
        the last record of a path counts.
        """
        place = Path(os.path.realpath(self.path))
        temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
        try:
            new = locked(temporary, PROGRAM, JournalError)
            with os.fdopen(os.dup(new), "wb") as f:
                f.writelines(json_line(record) for record in self.whole_records())
                f.flush()
                os.fsync(new)
            temporary.replace(place)
        except (OSError, JournalError) as e:
            temporary.unlink(missing_ok=True)
            _log.warning("lfm-edge: %s keeps records that later ones replace (%s)", self.path, e)
            return
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        os.close(self._descriptor)
        self._descriptor, self.superseded = new, 0

    def _read(self) -> int:
        """Learn what is there; returns where a last line begins that was cut off, or the end."""
        whole, last = 0, b""
        with self.path.open("rb") as f:
            for number, last in enumerate(f, 1):
                record = _parsed(last)
                self._others |= record is not None and record["settings"] != self.settings
                if not last.endswith(b"\n"):
                    break
                if record is None:
                    what = f"{self.path}, line {number} is no record of lfm-edge caption; remove the line, or"
                    what = what if number > 1 else f"{self.path} exists, and lfm-edge caption did not write it;"
                    raise JournalError(f"{what} choose another output")
                whole += len(last)
                self.superseded += record["path"] in self.records
                self._note(record)
        if whole == self.path.stat().st_size:
            return whole
        ours = last.startswith(b'{"path": "'[: len(last)]) and self._settings_place.exists()
        if not (whole or ours) or (_is_json(last) and _parsed(last) is None):  # ours may lack its newline alone
            raise JournalError(f"{self.path} exists, and lfm-edge caption did not write it; choose another output")
        return whole

    @property
    def _settings_place(self) -> Path:
        return self.path.with_name(f"{self.path.name}.settings.json")

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings; write down those of a new file."""
        place = self._settings_place
        try:
            before = read_json_object(place, JournalError, required=False)
        except JournalError:
            before = {"damaged": True}
        if before and "weights" not in before and place.exists() and not self.records:
            raise JournalError(f"{place} exists, and lfm-edge caption did not write it; choose another output")
        if not self._others:
            self._settings = {**settings, "tables": before.get("tables", {}) if self.records else {}}
            if not self.records or not before:
                write_whole(place, to_json(self._settings, indent=1) + "\n")
            return
        unlike = [
            f"{name}: {before.get(name)!r:.60}, now {value!r:.60}"
            for name, value in settings.items()
            if before and _plain(value) != before.get(name)
        ]
        raise JournalError(
            f"{self.path} was made with other settings ({'; '.join(unlike) or f'{place.name} does not say which'}); "
            "choose another output, or give the settings of the run before"
        )

    def wrote_table(self, path: Path) -> bool:
        """Whether a table is as a run of this output wrote it."""
        known = self._settings["tables"]
        return isinstance(known, dict) and known.get(self.key(str(path))) == file_hash(path)

    def note_table(self, path: Path) -> None:
        """Remember a table that was written."""
        known = self._settings["tables"]
        self._settings["tables"] = {**(known if isinstance(known, dict) else {}), self.key(str(path)): file_hash(path)}
        write_whole(self._settings_place, to_json(self._settings, indent=1) + "\n")

    def _note(self, record: Mapping[str, Any]) -> None:
        self.records[record["path"]] = Known(record["size"], record["modified"], "error" in record)


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
}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A record; None for what is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or any(key not in record for key in _KEYS):
        return None
    return record if all(isinstance(record[k], kinds) for k, kinds in _KINDS.items() if k in record) else None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as f:
        for line in f:
            yield json.loads(line)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The last record of every path of a file, in order; a cut-off last line is left out.

    Raises:
        JournalError: it cannot be read, or is no output of lfm-edge caption.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        with path.open("rb") as f:
            for number, line in enumerate(f, 1):
                record = _parsed(line)
                if record is None and number > 1 and not line.endswith(b"\n"):
                    break
                if record is None:
                    raise JournalError(f"{path}, line {number} is no record of lfm-edge caption; remove the line")
                found.pop(record["path"], None)
                found[record["path"]] = record
    except OSError as e:
        raise JournalError(f"{path} cannot be read ({e.strerror}); check the path") from e
    return list(found.values())
