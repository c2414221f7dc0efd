"""Snapshots and image features kept for the next prompt that starts alike: in memory within a byte budget, least
recently used out first, and, where a folder is given, on disk for the next process.

On disk an entry is one .npz (zip: every array has a checksum). It is written beside its name and renamed, so that
nobody reads half of one; one that cannot be read is removed and its work done again; a disk that cannot be written is
said once and then left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import re
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lfm_runtime.decode.state import Arrays, Snapshot
from lfm_runtime.errors import SettingError
from lfm_runtime.formats.contract import is_conv, is_past, past_names
from lfm_runtime.formats.files import check_outside_bundles
from lfm_runtime.formats.manifest import ModelFacts

Keys = NDArray[np.int64]
_log = logging.getLogger(__name__)
_ABANDONED_S = 3600
_ALIGNMENT = 64
"""Of arrays in memory, a line of the processor's cache."""
_OURS = re.compile(r"(?:image|prefix-(\d+))-[0-9a-f]{32}\.npz")
"""Names of our files. A folder may have others, which are not touched."""


class Cache:
    """What one model has computed of prompts' beginnings (`model` tells models apart)."""

    def __init__(
        self,
        model: str,
        facts: ModelFacts | None = None,
        *,
        max_bytes: int = 256 << 20,
        folder: Path | None = None,
        max_disk_bytes: int = 1 << 30,
    ) -> None:
        """`facts`: sizes of the model, which what lies on disk must have.

        Raises SettingError for a budget below 0 or a folder that is a file or cannot be made; EdgeError for a folder
            in a bundle.
        """
        if max_bytes < 0 or max_disk_bytes < 0:
            raise SettingError(f"a cache of {min(max_bytes, max_disk_bytes)} bytes is impossible; allowed: 0 and above")
        self._model, self._facts = model, facts
        self._max_bytes, self._max_disk_bytes = max_bytes, max_disk_bytes
        self._kept: OrderedDict[str, Arrays] = OrderedDict()
        self._lengths: dict[str, int] = {}
        self._folder = folder
        if folder is not None:
            check_outside_bundles(folder, itself=True)
            if folder.name.endswith(".prepared"):
                raise SettingError(f"{folder} is where lfm-edge prepare keeps graphs; name another cache folder")
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise SettingError(f"{folder} cannot be a cache folder ({e.strerror}); name another") from e
            for path in folder.glob(".partial-*"):  # of processes that were killed
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > _ABANDONED_S:
                        path.unlink()

    @property
    def nbytes(self) -> int:
        """Bytes held in memory; files on disk are not counted."""
        return sum(_nbytes(arrays) for arrays in self._kept.values())

    def longest(self, keys: Keys, *, longer_than: int = 0) -> Snapshot | None:
        """Return the snapshot of the longest kept prefix of `keys`; None where none is longer than `longer_than`."""
        names = (_OURS.fullmatch(path.name) for path in self._files())
        lengths = {*self._lengths.values(), *(int(name[1]) for name in names if name and name[1])}
        for length in sorted((n for n in lengths if longer_than < n <= len(keys)), reverse=True):
            values = self._get(self._prefix_name(keys[:length]), partial(self._is_state, length))
            if values is not None:
                return Snapshot(length, values)
        return None

    def keep(self, keys: Keys, snapshot: Snapshot) -> None:
        """Keep a snapshot of the state after `keys`."""
        name = self._prefix_name(keys)
        self._put(name, snapshot.values)
        if name in self._kept:
            self._lengths[name] = len(keys)

    def features(self, image: int, tokens: int) -> NDArray[np.float32] | None:
        """Return the features [tokens, H] kept for an image's key; None where there are none."""
        found = self._get(self._name("image", str(image).encode()), partial(self._is_features, tokens))
        return None if found is None else found["features"]

    def touch(self, image: int) -> None:
        """The features of this key are needed again soon, though not now."""
        name = self._name("image", str(image).encode())
        if name in self._kept:
            self._kept.move_to_end(name)

    def keep_features(self, image: int, features: NDArray[np.float32]) -> None:
        """Keep the features [image tokens, H] of an image under its key."""
        self._put(self._name("image", str(image).encode()), {"features": features})

    def _prefix_name(self, keys: Keys) -> str:
        return self._name(f"prefix-{len(keys)}", keys.tobytes())

    def _name(self, kind: str, content: bytes) -> str:
        return f"{kind}-{hashlib.sha256(self._model.encode() + content).hexdigest()[:32]}"

    def _is_features(self, tokens: int, found: Arrays) -> bool:
        """Whether arrays are the features of an image of so many tokens."""
        shape = found["features"].shape if found.keys() == {"features"} else ()
        return len(shape) == 2 and shape[0] == tokens and (self._facts is None or shape[1] == self._facts.hidden)

    def _is_state(self, length: int, found: Arrays) -> bool:
        """Whether arrays are a decoder's state after so many tokens."""
        facts = self._facts
        if facts is None:
            return True
        attention = (1, facts.kv_heads, length, facts.head_dim)
        shapes = {name: (1, facts.hidden, facts.conv_kernel) if is_conv(name) else attention for name in found}
        return len(found) == len(past_names(facts.layers)) and all(
            is_past(name) and found[name].shape == shapes[name] for name in found
        )

    def _get(self, name: str, fits: Callable[[Arrays], bool]) -> Arrays | None:
        """`fits`: whether what was found on disk, where anybody may write, can be what the name says."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        if self._folder is None or (arrays := _read(self._folder / f"{name}.npz", fits)) is None:
            return None
        self._keep_in_memory(name, arrays)
        return arrays

    def _put(self, name: str, arrays: Arrays) -> None:
        if name not in self._kept:
            self._keep_in_memory(name, arrays)
        if self._folder is not None and not (self._folder / f"{name}.npz").exists():
            try:
                _write(self._folder / f"{name}.npz", arrays)
                self._trim_disk()
            except OSError as e:
                _log.warning(
                    "lfm-edge: the cache folder %s cannot be written and is no longer used: %s",
                    self._folder,
                    e.strerror or e,
                )
                self._folder = None

    def _keep_in_memory(self, name: str, arrays: Arrays) -> None:
        size = _nbytes(arrays)
        if size > self._max_bytes:
            return
        while self.nbytes + size > self._max_bytes:
            gone = next(iter(self._kept))
            del self._kept[gone]  # no name may hold its arrays: their room is needed now
            self._lengths.pop(gone, None)
        self._kept[name] = _in_one_block(arrays)

    def _trim_disk(self) -> None:
        """Remove the files longest unused until the rest fits the disk's budget."""
        files = sorted(((path.stat().st_mtime, path.stat().st_size, path) for path in self._files()), reverse=True)
        used = 0
        for _, size, path in files:
            used += size
            if used > self._max_disk_bytes:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return [path for path in self._folder.glob("*.npz") if _OURS.fullmatch(path.name)] if self._folder else []


def _nbytes(arrays: Mapping[str, NDArray[np.generic]]) -> int:
    """Bytes that arrays take in a block of their own."""
    return -(-sum(_aligned(array.nbytes) for array in arrays.values()) // mmap.PAGESIZE) * mmap.PAGESIZE


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _in_one_block(arrays: Arrays) -> Arrays:
    """Copies that lie in pages of their own, which go back to the system with them. Blocks of many sizes that come and
    go among everything else would leave gaps: a process that answers for days grew by a quarter of the cache.
    """
    block, at, found = mmap.mmap(-1, max(_nbytes(arrays), mmap.PAGESIZE)), 0, {}
    for name, array in arrays.items():
        found[name] = np.frombuffer(block, array.dtype, array.size, at).reshape(array.shape)
        found[name][...] = array
        at += _aligned(array.nbytes)
    return found


def _read(path: Path, fits: Callable[[Arrays], bool]) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        _remove(path)
        return None
    if not fits(found) or any(array.dtype.kind not in "fi" for array in found.values()):
        _remove(path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # last used now, also on file systems that do not note it
    return found


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _write(path: Path, arrays: Arrays) -> None:
    descriptor, staging = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        Path(staging).replace(path)
    finally:
        Path(staging).unlink(missing_ok=True)
