"""The main path: pictures in, a record of each that is asked about out, and of each time that the source is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TypeAlias

import numpy as np
from lfm_runtime.answer.choice import Chosen
from lfm_runtime.errors import EdgeError, ImageError, PromptError
from lfm_runtime.report import Report
from numpy.typing import NDArray
from PIL import Image

from lfm_serve.asking import Asking
from lfm_serve.cameras.live import Back, Live, Lost
from lfm_serve.cameras.records import Records
from lfm_serve.cameras.scene import Scene, share_changed, small
from lfm_serve.cameras.settings import Roi, Until
from lfm_serve.cameras.sources import Frame, Source

_OF_A_FRAME = (ImageError, PromptError)
"""Errors of one picture: others are the model's, and would be those of every picture after it."""
_LEAST_EVERY_S = 0.1
"""Between two pictures of a live source that are only compared."""
Sight: TypeAlias = "Frame | Lost | Back"


@dataclass
class Seen:
    """What became of a run."""

    answered: int = 0
    unchanged: int = 0
    errors: int = 0
    lost: int = 0
    stopped: bool = False
    said: bool = False  # the answer that was waited for
    live: Live | None = None
    told: Callable[[Seen], None] = field(default=lambda _: None)

    def stop(self) -> None:
        """End after the answer that is being made; may be called by a signal's handler."""
        self.stopped = True
        if self.live:
            self.live.stop()


@dataclass(frozen=True)
class Look:
    """What is looked at, and how."""

    source: Source
    asked: Sequence[Asking]
    every: float = 0.0  # seconds; 0: as often as answers are made
    changed: float = 0.0  # the share of the picture that must differ from the one that was last asked about
    roi: Roi | None = None
    until: Until = field(default_factory=Until)


def look(scene: Scene, what: Look, records: Sequence[Records], seen: Seen) -> None:
    """Ask about pictures until the source ends, `what.until` says so, or `seen` is stopped. A live source never ends.

    Raises:
        SettingError: the region lies outside of the first picture.
        PromptError: a question cannot be asked about the first picture.
        SourceError: a source that is not live cannot be opened, or is cut off.
        RecordsError: records cannot be written, and want of room is not the reason.
        EdgeError: the model cannot be used any more.
    """

    def write(record: Mapping[str, Any]) -> None:
        for each in records:
            each.write(record)
        seen.told(seen)

    before: NDArray[np.uint8] | None = None
    first = True
    with closing(_sights(what, seen)) as sights:
        for sight in sights:
            if not isinstance(sight, Frame):
                seen.lost += isinstance(sight, Lost)
                write(_event(what.source, sight))
                continue
            head = _head(what.source, sight)
            try:
                picture = sight.picture()
                picture = what.roi.of(picture, first=first) if what.roi else picture
                first = False
                now = small(picture)
                share = 1.0 if before is None else share_changed(before, now)
                if share < what.changed:
                    seen.unchanged += 1
                    seen.told(seen)
                    continue
                image = scene.see(picture)
                before = now
            except _OF_A_FRAME as e:
                seen.errors += 1
                write({**head, "error": _line(e)})
                continue
            for asking in what.asked:
                record = {**head, **_looked(picture, share, asking)}
                try:
                    found = scene.ask(image, asking)
                except _OF_A_FRAME as e:
                    if isinstance(e, PromptError) and not seen.answered:  # the question is too long for any picture
                        raise
                    seen.errors += 1
                    write({**record, "error": _line(e)})
                    continue
                said = asking.outcome(found)
                seen.answered += "error" not in said
                seen.errors += "error" in said
                write({**record, **said, **_saved(found), "age_ms": round(sight.age * 1e3)})
                if what.until.said(said["text"]):
                    seen.said = True
                    return
                if seen.stopped:
                    return


def _sights(what: Look, seen: Seen) -> Generator[Sight, None, None]:
    """Pictures when they are due. Of a live source the newest, of others each."""
    if not what.source.live:
        with closing(what.source.frames()) as frames:
            for frame in frames:
                if seen.stopped or what.until.over():
                    return
                yield frame
        return
    seen.live = live = Live(what.source)
    due = time.monotonic()
    try:
        while not (seen.stopped or what.until.over()):
            if (left := due - time.monotonic()) > 0:
                sight = live.take(left if (end := what.until.left()) is None else min(left, end), pictures=False)
            else:
                sight = live.take(what.until.left())
            if sight is None:
                continue
            if isinstance(sight, Frame):
                due = time.monotonic() + max(what.every, _LEAST_EVERY_S if what.changed else 0.0)
            yield sight
    finally:
        live.close()


def _time(moment: float) -> str:
    return datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _head(source: Source, frame: Frame) -> dict[str, Any]:
    at = {} if frame.at is None else {"at": frame.at}
    return {"time": _time(frame.moment), "source": source.shown, "frame": frame.number, **at}


def _event(source: Source, event: Lost | Back) -> dict[str, Any]:
    head = {"time": _time(event.moment), "source": source.shown}
    if isinstance(event, Lost):
        return {**head, "event": "lost", "error": event.why}
    return {**head, "event": "back", "seconds": round(event.seconds, 1), "attempts": event.attempts}


def _looked(picture: Image.Image, share: float, asking: Asking) -> dict[str, Any]:
    return {"size": list(picture.size), "changed": round(share, 4), "question": asking.question}


def _saved(found: Report | Chosen) -> dict[str, Any]:
    report = found.report if isinstance(found, Chosen) else found
    return {"tiles": report.tiles, "encoded_tiles": report.encoded_tiles, "cached_tokens": report.cached_tokens}


def _line(error: EdgeError) -> str:
    return " ".join(str(error).split())
