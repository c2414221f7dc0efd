"""A live source that is drained all the time, so that the newest picture is new; opened again when it is lost."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass, field

from lfm_serve.cameras.sources import OLD_S, Frame, Source, SourceError

_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Before it is opened again; the last one from then on."""
_END_S, _SLICE_S, _MARGIN_S = 1.0, 0.5, 10.0
_MOST_EVENTS = 1000
_GOES_ON_S = 0.25
"""A source that has not ended so long after a picture goes on, so that this is whole: when a connection ends, ffmpeg
gives what it has of a picture as if it were all of it, and tells of the end at the next packet.
"""


@dataclass(frozen=True)
class Lost:
    """A source gives no pictures any more, or none yet; it is tried again from now on."""

    why: str
    moment: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Back:
    """It gives pictures again."""

    seconds: float  # that it was lost for
    attempts: int
    moment: float = field(default_factory=time.time)


class Live:
    """A thread that reads a source and keeps the newest picture only. It never ends by itself."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._ready = threading.Condition()
        self._newest: Frame | None = None
        self._coming: Frame | None = None  # newer, but perhaps cut off
        self._events: deque[Lost | Back] = deque(maxlen=_MOST_EVENTS)
        self._stopped = False  # no Event: a signal's handler could wait for its lock without end
        self._lost: float | None = None  # since when
        self._seen = time.monotonic()
        self._attempts = 0
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()

    def take(self, seconds: float | None, *, pictures: bool = True) -> Frame | Lost | Back | None:
        """What has become of the source, in order; then the newest picture that was not taken before and is at most 2 s
        old, waited for. None: after so many seconds there is none, or it was stopped. Without `pictures` these stay.
        """
        until = None if seconds is None else time.monotonic() + seconds
        with self._ready:
            while not self._stopped:
                if self._lost is None and time.monotonic() - self._seen > 2 * self._source.stall + _MARGIN_S:
                    self._lose(f"no picture for {time.monotonic() - self._seen:.0f} s")  # the reader itself is stuck
                if self._coming and time.monotonic() - self._seen >= _GOES_ON_S:
                    self._newest, self._coming = self._coming, None
                found, event = self._newest, self._events[0] if self._events else None
                before = isinstance(event, Lost) and pictures and found and found.moment <= event.moment
                if event and not before:  # in their order
                    if isinstance(event, Lost) and not pictures:
                        self._newest = None  # it will not be new when one is due
                    return self._events.popleft()
                if pictures:
                    self._newest = None
                    if found and found.age <= OLD_S:
                        return found
                    if event:
                        continue
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return None
                least = _GOES_ON_S if self._coming else _SLICE_S
                self._ready.wait(least if left is None else min(left, least))
        return None

    def stop(self) -> None:
        """End `take`, from any thread or a signal's handler."""
        self._stopped = True

    def close(self) -> None:
        """End the thread, and what it has opened. One that waits for a camera is left: it ends with the process."""
        self._stopped = True
        self._source.stop()
        self._thread.join(_END_S)

    def _run(self) -> None:
        while not self._stopped:
            try:
                with closing(self._source.frames()) as frames:
                    for frame in frames:
                        if self._stopped:
                            return
                        self._got(frame)
                why = "it ended"
            except SourceError as e:
                why = str(e)
            except Exception as e:  # noqa: BLE001  (a reader that dies would be a camera that nobody opens again)
                why = f"{type(e).__name__}: {e}"
            if not self._stopped:
                self._attempts += 1
                self._lose(why)
                self._wait(self._pause)

    @property
    def _pause(self) -> float:
        """Seconds before the next attempt: longer after each one that failed."""
        return _PAUSES_S[min(self._attempts, len(_PAUSES_S)) - 1]

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopped and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _SLICE_S))

    def _got(self, frame: Frame) -> None:
        with self._ready:
            self._seen = time.monotonic()
            if self._lost is not None:
                self._events.append(Back(self._seen - self._lost, self._attempts))
                self._lost = None
            self._attempts = 0
            if frame.whole:
                self._newest, self._coming = frame, None
            else:
                self._newest, self._coming = self._coming or self._newest, frame
            self._ready.notify()

    def _lose(self, why: str) -> None:
        with self._ready:
            self._coming = None
            if self._lost is None:
                self._lost = time.monotonic()
                self._events.append(Lost(why))
            self._ready.notify()
