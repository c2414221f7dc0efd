"""New images of folders (inotify, by watchdog): those that are written, when they are closed; those that are moved or
linked there, when nobody opens them to write.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from lfm_runtime.errors import ImageError, SettingError
from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

from lfm_serve.captions.images import wanted

_KINDS = {"closed": "closed", "moved": "made", "created": "made", "closed_no_write": "made", "opened": "opened"}
_SETTLED_S = 0.5
"""A file that is made by opening it is opened at once; one that was moved in is not opened at all."""


_ALL = ""
"""Instead of a path: what is there is to be looked at, as events were lost."""


class Watch:
    """Paths that are there, then those that come. Watching begins before what is there is listed: none is missed."""

    def __init__(self, folders: Sequence[str], *, recursive: bool, match: Sequence[str]) -> None:
        """Raises SettingError for a place that is no folder, or that cannot be watched."""
        self._events: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self._left, self._observer = len(folders), Observer()
        logging.getLogger("watchdog").addHandler(_Overflow(self._events))
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
        """Those of `there`, then new ones, until all folders are gone or `stop` is called. Where so many came at once
        that the kernel dropped some, all that are there `again`.
        """
        yield from there
        made: dict[str, float] = {}  # path → when it is taken if nobody opens it
        while self._left > 0:
            first = next(iter(made), None)
            try:
                left = None if first is None else max(0.0, made[first] - time.monotonic())
                kind, path = self._events.get(timeout=left)
            except Empty:
                assert first is not None
                del made[first]
                if first == _ALL:
                    yield from self._anew(again, warn)
                else:
                    yield first
                continue
            made.pop(path, None)
            if kind == "closed":
                yield path
            elif kind in ("made", "lost"):
                made[path] = time.monotonic() + _SETTLED_S
            elif kind == "gone":
                self._left -= 1
                warn(f"{path} is gone, and watched no more")

    @staticmethod
    def _anew(again: Callable[[], Iterable[str]], warn: Callable[[str], None]) -> Iterator[str]:
        warn("more images came at once than the kernel counts; looking at all that are there")
        try:
            yield from again()
        except ImageError as e:  # a folder that is gone
            warn(str(e))

    def stop(self) -> None:
        """End `paths`; may be called by a signal's handler."""
        self._left = 0
        self._events.put(("stop", ""))


class _Overflow(logging.Handler):
    """Passes on that the kernel's queue was full, which watchdog tells its log alone."""

    def __init__(self, events: SimpleQueue[tuple[str, str]]) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        """Implement logging.Handler."""
        if "filesystem events were lost" in record.getMessage():
            self._events.put(("lost", _ALL))


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
