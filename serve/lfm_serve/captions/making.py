"""The main path: images in, a record of each out, several answered at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lfm_runtime.answer.choice import Choice, Chosen
from lfm_runtime.answer.reply import Job
from lfm_runtime.batch import Batch, Scoring, Seat, finished
from lfm_runtime.errors import ImageError, PromptError
from lfm_runtime.model import Model
from lfm_runtime.report import Report

from lfm_serve.asking import Asking
from lfm_serve.captions.images import Reader, ReadImage, is_unchanged, read_image
from lfm_serve.captions.journal import Journal

_OF_AN_IMAGE = (ImageError, PromptError)
"""Errors of an image, or of its question: others are the model's, and would be those of every image after it."""
_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Between attempts to write where the disk is full; the last one from then on."""


@dataclass
class Counts:
    """What became of the images of a run."""

    answered: int = 0
    errors: int = 0
    unchanged: int = 0
    stopped: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        """Images that got a record."""
        return self.answered + self.errors


def missing(journal: Journal, counts: Counts, paths: Iterable[str], *, retry_errors: bool) -> Iterator[str]:
    """The paths without a record, or that have changed since; with `retry_errors` those with an error too. The others
    are counted.
    """
    for path in paths:
        record = journal.records.get(journal.key(path))
        if record and not (retry_errors and record.failed) and is_unchanged(path, record):
            counts.unchanged += 1
        else:
            yield path


class Captions:
    """A question about images, and where the records go."""

    def __init__(
        self, model: Model, asking: Asking, generation: Mapping[str, Any], journal: Journal, counts: Counts
    ) -> None:
        self.model, self.asking, self.generation, self.journal = model, asking, generation, journal
        self.counts = counts
        self._reader: Reader | None = None

    def make(
        self,
        paths: Iterable[str],
        *,
        rows: int,
        capacity: int,
        max_megapixels: float,
        told: Callable[[ReadImage, dict[str, Any]], None],
        warn: Callable[[str], None],
    ) -> None:
        """Answer about every image, `rows` at once, each with room for `capacity` tokens of prompt and answer. `told`
        of every record once it is written.

        Raises:
            JournalError: a record cannot be written, and want of room is not the reason.
            EdgeError: the model cannot be used any more: an error of one image is its record.
        """
        self._reader = Reader(
            paths, lambda path: read_image(self.model, path, self.journal.key(path), max_megapixels=max_megapixels)
        )
        if self.counts.stopped:  # before there was a reader to be stopped
            self._reader.stop()
        made = self._together(self._reader, rows, capacity) if rows > 1 else self._one_by_one(self._reader)
        for image, found in made:
            record, known = self._record(image, found), self.journal.records.get(image.key)
            if "error" in record and image.sha256 is None and known and not known.failed:
                warn(f"{image.path} {record['error']}; its record stays")
                self.counts.unchanged += 1
                continue
            if not self._write(record, warn):
                return
            self.counts.answered += "error" not in record
            self.counts.errors += "error" in record
            told(image, record)

    def stop(self) -> None:
        """Begin no more answers; those that are being made get their records. May be called by a signal's handler."""
        self.counts.stopped = True
        if self._reader:
            self._reader.stop()

    def _together(
        self, reader: Reader, rows: int, capacity: int
    ) -> Iterator[tuple[ReadImage, Report | Chosen | Exception]]:
        def take(wait: bool) -> tuple[ReadImage, Any] | None:
            image = reader.take(wait)
            return None if image is None else (image, self._work(image))

        batch = Batch(self.model, rows, capacity)
        with self.model.sessions.execution.pinned():
            for image, found in finished(batch, take):
                yield image, _outcome(found)

    def _one_by_one(self, reader: Reader) -> Iterator[tuple[ReadImage, Report | Chosen | Exception]]:
        while image := reader.take(True):
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
            return self.asking.work(self.model, image.image, self.generation)
        except _OF_AN_IMAGE as e:
            return e

    def _record(self, image: ReadImage, found: Report | Chosen | Exception) -> dict[str, Any]:
        record: dict[str, Any] = {
            "path": image.key,
            "sha256": image.sha256,
            "size": image.size,
            "modified": image.modified,
            "settings": self.journal.settings,
        }
        if isinstance(found, Exception):
            return {**record, "error": " ".join(str(found).split())}
        return {**record, **self.asking.outcome(found)}

    def _write(self, record: dict[str, Any], warn: Callable[[str], None]) -> bool:
        """Write a record; where the disk is full, say so once and wait until there is room. False: stopped."""
        attempt = 0
        while full := self.journal.write(record):
            if attempt == 0:
                warn(f"{full}; waiting until there is room (Ctrl-C ends; what is written is whole)")
            again = time.monotonic() + _PAUSES_S[min(attempt, len(_PAUSES_S) - 1)]
            while time.monotonic() < again:
                if self.counts.stopped:
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
