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
from typing import Any

from lfm_runtime.formats.files import check_outside_bundles, check_writable, read_json_object, write_whole

from lfm_serve.captions.output import JournalError, Output, last_of_each, parsed
from lfm_serve.jsonl import FULL, WATCHED, append, is_json, json_line, locked

PROGRAM = "lfm-edge caption"
_log = logging.getLogger(__name__)
_SYNC_S = 1.0


class Journal(Output):
    """An open file, with the lock of the only writer."""

    def __init__(self, path: Path, descriptor: int, settings: str, *, remembers: bool = False) -> None:
        """`remembers`: the same image may come twice in this run, so what is written is known as well."""
        super().__init__(str(path), settings)
        self.path, self._remembers = path, remembers
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
        """How records name an image: relative to the output's folder where it lies below it, else absolute; an URL is
        its own name.
        """
        if "://" in path:
            return path
        whole, base = os.path.abspath(path), str(self.path.parent)  # noqa: PTH100  (links stay)
        return os.path.relpath(whole, base) if whole.startswith(f"{base}{os.sep}") else whole

    def write(self, record: dict[str, Any]) -> str:
        """Append a record: see Output."""
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
        """See Output; it is the order of the file."""
        return last_of_each(lambda: _records(self.path))

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
        whole, number, last, began = 0, 0, b"", settings_place(self.path).exists()
        with self.path.open("rb") as f:
            for number, last in enumerate(f, 1):
                record = parsed(last)
                self._others |= record is not None and record["settings"] != self.settings
                if not last.endswith(b"\n"):
                    break
                if record is None:
                    raise self._foreign(number, ours=began or number > 1)
                whole += len(last)
                self.superseded += record["path"] in self.records
                self._note(record)
        if whole == self.path.stat().st_size:
            return whole
        ours = last.startswith(b'{"path": "'[: len(last)]) and began
        if not (whole or ours) or (is_json(last) and parsed(last) is None):  # ours may lack its newline alone
            raise self._foreign(number, ours=bool(whole or ours))
        return whole

    def _foreign(self, number: int, *, ours: bool) -> JournalError:
        """For a line that is no record, in a file that is ours but for it, or not."""
        what = f"{self.path} exists, and lfm-edge caption did not write it;"
        if ours:
            what = f"{self.path}, line {number} is no record of lfm-edge caption; remove the line, or"
        return JournalError(f"{what} choose another output")

    def _read_settings(self) -> dict[str, Any]:
        return read_json_object(settings_place(self.path), JournalError, required=False)

    def _write_settings(self, text: str) -> None:
        write_whole(settings_place(self.path), text)


def settings_place(output: Path) -> Path:
    """The file beside an output that says how it was made."""
    return output.with_name(f"{output.name}.settings.json")


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
                record = parsed(line)
                if record is None and number > 1 and not line.endswith(b"\n"):
                    break
                if record is None:
                    if line.startswith(WATCHED):
                        raise JournalError(
                            f"{path} has records of lfm-edge watch, not of lfm-edge caption; name what caption wrote"
                        )
                    if number == 1 and not settings_place(path).exists():
                        raise JournalError(f"{path} was not written by lfm-edge caption; name what it wrote")
                    raise JournalError(f"{path}, line {number} is no record of lfm-edge caption; remove the line")
                found.pop(record["path"], None)
                found[record["path"]] = record
    except OSError as e:
        raise JournalError(f"{path} cannot be read ({e.strerror}); check the path") from e
    return list(found.values())
