"""Where the records of a camera go: standard output, a JSONL file, a topic of MQTT. A camera waits for none of them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lfm_runtime.commands.console import print_json
from lfm_runtime.errors import EdgeError, counted
from lfm_runtime.formats.files import check_outside_bundles, check_writable

from lfm_serve.jsonl import FULL, WATCHED, append, is_json, json_line, locked

_SYNC_S = 1.0
_LAST = 1 << 20
"""No record is longer: looked back for the beginning of the last line."""
Warn = Callable[[str], None]


class RecordsError(EdgeError):
    """Records cannot be written there: the message says why, and what to do."""


class Records(Protocol):
    """Takes records."""

    lost: int = 0  # records that never will be

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one, or say once that it cannot be done for now."""
        ...


class Printed(Records):
    """On standard output."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Implement Records.write."""
        print_json(record)
        sys.stdout.flush()


class Told(Records):
    """What becomes of the source, on standard error."""

    def __init__(self, warn: Warn) -> None:
        self._warn = warn

    def write(self, record: Mapping[str, Any]) -> None:
        """Implement Records.write."""
        if record.get("event") == "lost":
            self._warn(f"{record['source']}: {record['error']}; trying again until it is there")
        elif record.get("event") == "back":
            self._warn(f"{record['source']}: there again after {record['seconds']:g} s")


class Appended(Records):
    """At the end of a JSONL file. Where there is no room, records are lost until there is; the number is told."""

    def __init__(self, path: Path, warn: Warn) -> None:
        """Raises RecordsError for a file that lfm-edge watch did not write, or that another process writes."""
        check_writable(path)
        check_outside_bundles(path)
        self._path, self._warn = path, warn
        self._descriptor = locked(path, "lfm-edge watch", RecordsError)
        self._synced, self._lost = 0.0, 0
        try:
            os.ftruncate(self._descriptor, _whole_end(path))
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, record: Mapping[str, Any]) -> None:
        """Implement Records.write.

        Raises:
            RecordsError: it cannot be written, and want of room is not the reason.
        """
        sync = time.monotonic() - self._synced > _SYNC_S
        if sync:
            self._follow()
        try:
            append(self._descriptor, json_line(record), sync=sync)
        except OSError as e:
            if e.errno not in FULL:
                raise RecordsError(f"{self._path} cannot be written ({e.strerror}); run again to go on") from e
            if not self._lost:
                self._warn(f"{self._path}: {e.strerror}; records are lost until there is room")
            self._lost += 1
            self.lost += 1
            return
        self._synced = time.monotonic() if sync else self._synced
        self._tell_lost()

    def close(self) -> None:
        """Nothing more is written."""
        self._tell_lost()
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def _follow(self) -> None:
        """Where the file was moved away (logrotate), begin a new one."""
        try:
            same = os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except OSError:
            same = False
        if not same:
            before, self._descriptor = self._descriptor, locked(self._path, "lfm-edge watch", RecordsError)
            os.close(before)

    def _tell_lost(self) -> None:
        if self._lost:
            self._warn(f"{self._path}: {counted(self._lost, 'record')} lost for want of room")
            self._lost = 0


def _whole_end(path: Path) -> int:
    """Where the last whole record ends: a killed process, or a board without power, may have cut one off."""
    with path.open("rb") as f:
        first, size = f.readline(_LAST), f.seek(0, os.SEEK_END)
        if not size:
            return 0
        f.seek(max(0, size - _LAST))
        last = f.read()
    torn = last[last.rfind(b"\n") + 1 :]
    begun = torn.startswith(WATCHED[: len(torn)])
    try:
        record = json.loads(first)
        begun |= not is_json(torn)  # whatever it is: a board that lost its power may leave zeros
        ours = isinstance(record, dict) and isinstance(record.get("time"), str) and "source" in record
        ours = ours and ("frame" in record or "event" in record)
    except (ValueError, RecursionError):
        ours = not first.endswith(b"\n")
    if not (ours and begun):
        raise RecordsError(
            f"{path} exists, and lfm-edge watch did not write it, or it was edited since; choose another output"
        )
    return size - len(last) + last.rfind(b"\n") + 1
