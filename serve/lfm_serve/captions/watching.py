"""New images of folders (inotify, by watchdog): those that are written, when they are closed; those that are moved or
linked there, when nobody opens them to write.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from queue import Empty, SimpleQueue
from typing import Any

from lfm_runtime.errors import ImageError, SettingError
from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

from lfm_serve.captions.images import wanted

_KINDS = {"closed": "closed", "moved": "made", "created": "made", "closed_no_write": "made", "opened": "opened"}
_SETTLED_S = 0.5
"""A file that is made by opening it is opened at once; one that was moved in is not opened at all."""


logging.getLogger("watchdog").addHandler(logging.NullHandler())  # events that it says were lost are found again
AGAIN_S = 300.0
"""What the kernel does not tell of is found then: more events at once than it counts, files on network disks."""
_IN_WORK = 64
"""Of the last paths that were given, some may not have a record yet."""


class Watch:
    """Paths that are there, then those that come. Watching begins before what is there is listed: none is missed."""

    def __init__(
        self, folders: Sequence[str], *, recursive: bool, match: Sequence[str], again_s: float = AGAIN_S
    ) -> None:
        """Raises SettingError for a place that is no folder, or that cannot be watched. `again_s`: seconds after which
        all that is there is looked at again.
        """
        self._events: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self._left, self._observer = len(folders), Observer()
        self._given: deque[str] = deque(maxlen=_IN_WORK)
        self._again_s = again_s
        for folder in folders:
            if not os.path.isdir(folder):  # noqa: PTH112  (as images.find)
                raise SettingError(f"{folder} is not a folder; --watch waits for images in folders")
            try:
                handler = _Handler(self._events, folder, match)
                self._observer.schedule(handler, os.path.realpath(folder), recursive=recursive)  # no link is watched
            except OSError as e:
                raise SettingError(f"{folder} cannot be watched ({e.strerror}); run again without --watch") from e
        self._observer.start()

    def paths(
        self, there: Iterable[str], again: Callable[[], Iterable[str]], warn: Callable[[str], None]
    ) -> Iterator[str]:
        """Those of `there`, then new ones, until all folders are gone or `stop` is called; now and then all that are
        there `again`: what is known already, the caller leaves out.
        """
        for path in chain(there, self._new(again, warn)):
            self._given.append(path)
            yield path

    def _new(self, again: Callable[[], Iterable[str]], warn: Callable[[str], None]) -> Iterator[str]:
        made: dict[str, float] = {}  # path → when it is taken if nobody opens it
        due = time.monotonic() + self._again_s
        while self._left > 0:
            first = next(iter(made), None)
            until = due if first is None else min(due, made[first])
            try:
                kind, path = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                if first is not None and until == made[first]:
                    del made[first]
                    yield first
                    continue
                try:
                    yield from (path for path in again() if path not in self._given)
                except ImageError as e:  # a folder that is gone
                    warn(str(e))
                due = time.monotonic() + self._again_s
                continue
            made.pop(path, None)
            if kind == "closed":
                yield path
            elif kind == "made":
                made[path] = time.monotonic() + _SETTLED_S
            elif kind == "gone":
                self._left -= 1
                warn(f"{path} is gone, and watched no more")

    def stop(self) -> None:
        """End `paths`; may be called by a signal's handler."""
        self._left = 0
        self._events.put(("stop", ""))


class _Handler(FileSystemEventHandler):
    """Passes on what happens to images of a folder."""

    def __init__(self, events: SimpleQueue[tuple[str, str]], folder: str, match: Sequence[str]) -> None:
        self._events, self._folder, self._match = events, folder, match
        self._real = os.path.realpath(folder)

    def dispatch(self, event: Any) -> None:
        """Called by watchdog in a thread of its own."""
        real = os.fsdecode(event.dest_path if event.event_type == "moved" else event.src_path)
        if event.event_type in ("deleted", "moved") and os.fsdecode(event.src_path) == self._real:
            self._events.put(("gone", self._folder))
        kind = _KINDS.get(event.event_type)
        path = os.path.join(self._folder, os.path.relpath(real, self._real))  # noqa: PTH118
        if kind and not event.is_directory and wanted(path, self._folder, self._match):
            self._events.put((kind, path))
