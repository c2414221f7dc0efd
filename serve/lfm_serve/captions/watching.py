"""New images of folders, as they are closed (inotify, by watchdog)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

from lfm_runtime.errors import SettingError

from lfm_serve.captions.images import wanted

_GONE = ""


class Watch:
    """Paths that are there, then those that come. Watching begins before what is there is listed: none is missed."""

    def __init__(self, folders: Sequence[str], *, recursive: bool, match: Sequence[str]) -> None:
        """Raises SettingError for a place that is no folder, or that cannot be watched."""
        from watchdog.events import FileClosedEvent, FileMovedEvent, FileSystemEventHandler
        from watchdog.observers import Observer

        queue: SimpleQueue[str] = SimpleQueue()

        class Handler(FileSystemEventHandler):
            def __init__(self, folder: str) -> None:
                self.folder = folder

            def dispatch(self, event: Any) -> None:
                at = event.dest_path if isinstance(event, FileMovedEvent) else event.src_path
                path = os.fsdecode(at)
                if isinstance(event, FileClosedEvent | FileMovedEvent) and wanted(path, self.folder, match):
                    queue.put(path)
                elif event.event_type == "deleted" and event.is_directory and path == self.folder:
                    queue.put(_GONE)

        self._queue, self._left, self._observer = queue, len(folders), Observer()
        for folder in folders:
            if not os.path.isdir(folder):  # noqa: PTH112  (as images.find)
                raise SettingError(f"{folder} is not a folder; --watch waits for images in folders")
            try:
                self._observer.schedule(Handler(folder), folder, recursive=recursive)
            except OSError as e:
                raise SettingError(f"{folder} cannot be watched ({e.strerror}); run again without --watch") from e
        self._observer.start()

    def paths(self, there: Iterable[str], warn: Callable[[str], None]) -> Iterator[str]:
        """Those of `there`, then new ones, until all folders are gone or `stop` is called."""
        yield from there
        while self._left > 0:
            path = self._queue.get()
            if path == _GONE:
                self._left -= 1
                warn("a folder that is watched is gone")
            else:
                yield path

    def stop(self) -> None:
        """End `paths`; may be called by a signal's handler."""
        self._left = 0
        self._queue.put(_GONE)
