"""Records at an URL, where nothing can be appended to a file: parts beside it, each written whole, merged at the end.

OUT.jsonl.parts/ has a part for some hundred records, or for half a minute; what a run that ended early has written is
there for the next one. The last record of a path counts: OUT.jsonl is read first, then the parts in the order of names.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lfm_serve.captions.output import JournalError, Output, last_of_each, parsed
from lfm_serve.jsonl import FULL, json_line

from lfm_fleet.places import filesystem, is_url, why

_RECORDS, _SECONDS = 500, 30.0
_PAUSES_S = (1.0, 5.0, None)
"""Between attempts to write a part."""
_OBJECTS = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "memory"))
"""Stores in which a file appears when it is whole."""


class Parts(Output):
    """An open output at an URL. Two runs at once write parts of different names; nothing tells them apart otherwise."""

    def __init__(self, url: str, settings: str) -> None:
        super().__init__(url, settings)
        self._fs, self._path = filesystem(url)
        self._folder = f"{self._path}.parts"
        self._run = f"{time.time_ns():020}-{secrets.token_hex(4)}"
        self._written = 0  # parts of this run
        self._buffer: dict[str, bytes] = {}  # path → line
        self._since = time.monotonic()  # when the buffer was empty

    @staticmethod
    @contextmanager
    def open(url: str, settings: Mapping[str, Any], digest: str) -> Iterator[Parts]:
        """Open an output, new or to go on with. What is buffered is written at the end, whatever ends the run; parts
        are merged where it ends well.

        Raises:
            JournalError: it is somebody else's, cannot be written, or is of other settings.
        """
        parts = Parts(url, digest)
        with parts._errors():
            for record in parts._records(parts._places()):
                parts._others |= record["settings"] != digest
                parts._note(record)
            parts._check_settings(settings)
        try:
            yield parts
        finally:
            if problem := parts._flush():
                raise JournalError(f"{problem}; {len(parts._buffer)} records are lost, run again to make them anew")
        with parts._errors():
            parts._merge()

    def key(self, path: str) -> str:
        """Relative to the output's folder where it lies below it, else the whole URL or path."""
        base = f"{self.name.rpartition('/')[0]}/"
        if is_url(path):
            return path.removeprefix(base)
        whole = os.path.abspath(path)  # noqa: PTH100  (links stay)
        return whole.removeprefix(base.removeprefix("file://")) if base.startswith("file://") else whole

    def write(self, record: dict[str, Any]) -> str:
        """See Output; it is in a part after some hundred records, or half a minute."""
        self._buffer[record["path"]] = json_line(record)
        if len(self._buffer) < _RECORDS and time.monotonic() - self._since < _SECONDS:
            return ""
        return self._flush()

    def whole_records(self) -> Iterator[dict[str, Any]]:
        """See Output."""
        places = self._places()
        return last_of_each(lambda: self._records(places))

    def _flush(self) -> str:
        """Write a part; returns "", or what the driver says where there is no room, and then it is tried again."""
        if not self._buffer:
            return ""
        name = f"{self._folder}/{self._run}-{self._written:08}.jsonl"
        for pause in _PAUSES_S:
            try:
                self._fs.makedirs(self._folder, exist_ok=True)
                self._put(name, b"".join(self._buffer.values()))
                break
            except MemoryError:
                raise
            except Exception as e:  # a driver raises what its library does: botocore's, paramiko's, aiohttp's
                if isinstance(e, OSError) and e.errno in FULL:
                    return f"{self._folder}: {why(e)}"
                if pause is None:
                    raise JournalError(f"{self._folder} cannot be written ({why(e)}); run again to go on") from e
                time.sleep(pause)
        self._written += 1
        self._buffer.clear()
        self._since = time.monotonic()
        return ""

    def _merge(self) -> None:
        """One file of all records, and no parts but those that another run writes."""
        places = self._places()
        if places in ([], [self._path]):
            return
        with tempfile.NamedTemporaryFile(prefix="lfm-edge-", suffix=".jsonl") as f:
            f.writelines(json_line(record) for record in last_of_each(lambda: self._records(places)))
            f.flush()
            self._placed(self._path, lambda place: self._fs.put_file(f.name, place))
        for place in places:
            if place != self._path:
                self._fs.rm_file(place)
        with suppress(Exception):  # another run's parts are in it; an object store has no folders
            self._fs.rmdir(self._folder)

    def _places(self) -> list[str]:
        """The file where it is there, and the parts."""
        self._fs.invalidate_cache()
        parts = self._fs.ls(self._folder, detail=False) if self._fs.isdir(self._folder) else []
        named = sorted(str(name) for name in parts if str(name).endswith(".jsonl"))
        return [*([self._path] if self._fs.isfile(self._path) else []), *named]

    def _records(self, places: Sequence[str]) -> Iterator[dict[str, Any]]:
        for place in places:
            with self._fs.open(place, "rb") as f:
                for number, line in enumerate(f, 1):
                    record = parsed(line)
                    if record is None and number > 1 and not line.endswith(b"\n"):
                        break  # cut off where it was written
                    if record is None:
                        raise JournalError(
                            f"{place}, line {number} is no record of lfm-edge caption; choose another output"
                        )
                    yield record

    def _put(self, name: str, content: bytes) -> None:
        self._placed(name, lambda place: self._fs.pipe_file(place, content))

    def _placed(self, name: str, write: Callable[[str], object]) -> None:
        """Write a file whole: an object store does so by itself; elsewhere by another name first."""
        if _OBJECTS.intersection([self._fs.protocol] if isinstance(self._fs.protocol, str) else self._fs.protocol):
            write(name)
            return
        write(f"{name}.tmp")
        self._fs.mv(f"{name}.tmp", name)

    def _read_settings(self) -> dict[str, Any]:
        place = f"{self._path}.settings.json"
        if not self._fs.isfile(place):
            return {}
        try:
            found = json.loads(self._fs.cat_file(place))
        except (ValueError, RecursionError) as e:
            raise JournalError(f"{place} is damaged") from e
        if not isinstance(found, dict):
            raise JournalError(f"{place} is damaged")
        return found

    def _write_settings(self, text: str) -> None:
        self._put(f"{self._path}.settings.json", text.encode())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (JournalError, MemoryError):
            raise
        except Exception as e:  # see _flush
            raise JournalError(f"{self.name} cannot be read and written ({why(e)}); choose another output") from e
