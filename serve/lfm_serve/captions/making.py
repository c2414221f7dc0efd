"""The main path: images in, a record of each out, several answered at once; and the records kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lfm_runtime.answer.choice import Choice, Chosen
from lfm_runtime.answer.reply import Job
from lfm_runtime.batch import Batch, Scoring, Seat, finished
from lfm_runtime.errors import ImageError, PromptError
from lfm_runtime.model import Model
from lfm_runtime.report import Report

from lfm_serve.asking import Asking
from lfm_serve.captions.images import Reader, ReadImage
from lfm_serve.captions.output import Known, Output

_OF_AN_IMAGE = (ImageError, PromptError)
"""Errors of an image, or of its question: others are the model's, and would be those of every image after it."""
_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Between attempts to write where the disk is full; the last one from then on."""


@dataclass
class Counts:
    """What became of the images of a run."""

    answered: int = 0
    errors: int = 0
    unchanged: int = 0  # of before
    failed: int = 0  # of those, with an error
    stopped: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        """Images that got a record."""
        return self.answered + self.errors


class Answers:
    """A question about images, asked of a model that is loaded."""

    def __init__(self, model: Model, asking: Asking, settings: str, *, rows: int, capacity: int) -> None:
        """`settings`: their hash, which records name; `rows`: answers at once, each with room for `capacity` tokens of
        prompt and answer.
        """
        self.model, self.asking, self.settings = model, asking, settings
        self.rows, self.capacity = rows if model.decoder.info.shares_kv else 1, capacity

    def records(self, images: Reader[Any]) -> Iterator[tuple[ReadImage, dict[str, Any]]]:
        """Answer about every image; each with its record, in the order of completion.

        Raises:
            EdgeError: the model cannot be used any more: an error of one image is its record.
        """
        found = self._together(images) if self.rows > 1 else self._one_by_one(images)
        return ((image, self._record(image, outcome)) for image, outcome in found)

    def _together(self, images: Reader[Any]) -> Iterator[tuple[ReadImage, Report | Chosen | Exception]]:
        def take(wait: bool) -> tuple[ReadImage, Any] | None:
            image = images.take(wait)
            return None if image is None else (image, self._work(image))

        batch = Batch(self.model, self.rows, self.capacity)
        with self.model.sessions.execution.pinned():
            for image, found in finished(batch, take):
                yield image, _outcome(found)

    def _one_by_one(self, images: Reader[Any]) -> Iterator[tuple[ReadImage, Report | Chosen | Exception]]:
        while image := images.take(True):
            work = self._work(image)
            try:
                found = work if isinstance(work, Exception) else self._done(work)
            except _OF_AN_IMAGE as e:
                found = e
            yield image, found

    def _done(self, work: Job | Sequence[Choice]) -> Report | Chosen:
        if not isinstance(work, Job):
            return self.model.chosen(work)[0]
        answer = self.model.answering(work)
        answer.text()
        return answer.report

    def _work(self, image: ReadImage) -> Any:
        if image.error or image.image is None:
            return image.error
        try:
            return self.asking.work(self.model, image.image)
        except _OF_AN_IMAGE as e:
            return e

    def _record(self, image: ReadImage, found: Report | Chosen | Exception) -> dict[str, Any]:
        record = about(image.key, image.sha256, image.size, image.modified, self.settings)
        if isinstance(found, Exception):
            return {**record, "error": " ".join(str(found).split())}
        return {**record, **self.asking.outcome(found)}


def about(key: str, sha256: str | None, size: int | None, modified: float | None, settings: str) -> dict[str, Any]:
    """How every record begins: which image, and which settings."""
    return {"path": key, "sha256": sha256, "size": size, "modified": modified, "settings": settings}


def missing(
    output: Output,
    counts: Counts,
    paths: Iterable[str],
    is_unchanged: Callable[[str, Known], bool],
    *,
    retry_errors: bool,
) -> Iterator[str]:
    """The paths without a record, or that have changed since; with `retry_errors` those with an error too. The others
    are counted.
    """
    for path in paths:
        record = output.records.get(output.key(path))
        if record and not (retry_errors and record.failed) and is_unchanged(path, record):
            counts.unchanged += 1
            counts.failed += record.failed
        else:
            yield path


def keep(
    made: Iterable[tuple[str, dict[str, Any]]],
    output: Output,
    counts: Counts,
    told: Callable[[str, dict[str, Any]], None],
    warn: Callable[[str], None],
) -> None:
    """Write the record of every path; `told` of each once it is written.

    Raises:
        JournalError: a record cannot be written, and want of room is not the reason.
    """
    for path, record in made:
        known = output.records.get(record["path"])
        if "error" in record and record["sha256"] is None and known and not known.failed:
            warn(f"{path} {record['error']}; its record stays")
            counts.unchanged += 1
            continue
        if not with_room(partial(output.write, record), counts, warn):
            return
        counts.answered += "error" not in record
        counts.errors += "error" in record
        told(path, record)


def with_room(write: Callable[[], str], counts: Counts, warn: Callable[[str], None]) -> bool:
    """Write something; where the disk is full, which `write` returns in words, say so once and wait until there is
    room. False: stopped.
    """
    attempt = 0
    while full := write():
        if attempt == 0:
            warn(f"{full}; waiting until there is room (Ctrl-C ends; what is written is whole)")
        again = time.monotonic() + _PAUSES_S[min(attempt, len(_PAUSES_S) - 1)]
        while time.monotonic() < again:
            if counts.stopped:
                return False
            time.sleep(0.1)
        attempt += 1
    if attempt:
        warn("there is room again")
    return True


def _outcome(found: Seat | Scoring | Exception) -> Report | Chosen | Exception:
    if isinstance(found, Exception):
        return found
    if found.error:
        if isinstance(found.error, _OF_AN_IMAGE):
            return found.error
        raise found.error
    if isinstance(found, Seat):
        return found.job.reply.report
    assert found.chosen
    return found.chosen[0]
