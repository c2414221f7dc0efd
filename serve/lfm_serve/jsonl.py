"""Files of records that one process at a time appends to."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.files import to_json

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where there is no room for a record."""
WATCHED = b'{"time": "'
"""How each record of `lfm-edge watch` begins."""


def json_line(value: Mapping[str, Any]) -> bytes:
    """A value as a line of JSON. A name that is not UTF-8 is written with escapes, which Python reads again."""
    return (to_json(value) + "\n").encode()


def is_json(text: str | bytes) -> bool:
    """Whether a text is one whole JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def locked(path: Path, program: str, error: type[EdgeError]) -> int:
    """A descriptor that appends to a file, with the lock of the only writer.

    Raises:
        error: it cannot be written, or another process of `program` writes it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as e:
        raise error(f"{path} cannot be written ({e.strerror}); choose another place") from e
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), path.stat()):  # written anew by the writer before, at this moment
            os.close(descriptor)
            return locked(path, program, error)
    except OSError as e:
        os.close(descriptor)
        raise error(f"{path} is being written by another {program}; wait, or choose another output") from e
    return descriptor


def append(descriptor: int, line: bytes, *, sync: bool) -> None:
    """Append a line, whole or not at all; with `sync` until it is on the disk.

    Raises:
        OSError: as the system says; nothing of it is there.
    """
    before, done = os.fstat(descriptor).st_size, 0
    try:
        while done < len(line):
            done += os.write(descriptor, line[done:])
        if sync:
            os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, before)
        raise
