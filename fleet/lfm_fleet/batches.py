"""The main path: images in, batches of them as Dask's tasks, records out in the order of completion.

A few batches a worker are sent at a time, each of about ten seconds' work: little is lost where a worker dies, and the
scheduler knows few tasks, however many images there are. Nothing of an image goes through the scheduler: workers read
images where they lie, and texts come back.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any

from distributed import Client, Future
from distributed.scheduler import KilledWorker
from lfm_serve.captions.making import about

from lfm_fleet.crew import GONE, RESOURCE, RETURN_S, ClusterError, Crew, is_reached
from lfm_fleet.job import Item, Job
from lfm_fleet.places import why
from lfm_fleet.worker import Answered, Refused, answer, release

BATCH_S = 10.0
MOST_IMAGES = 64
"""Of a batch."""
_SENT = 2
"""Batches a worker has: one that it is at, one that waits there."""
_TAIL = 4
"""Batches that each worker should still get of what is left: so all end at about the same time."""
_RETRIES = 2
_MOST_LOSSES = 3
"""As Dask's own distributed.scheduler.allowed-failures."""
_LOOK_S = 1.0
_FETCH_S = 60.0


@dataclass(frozen=True)
class Batch:
    """Images that are sent together."""

    items: Sequence[Item]
    suspect: bool = False  # workers died while they had it: it is sent when nothing else is
    losses: int = 0  # how often all workers that could do it have left


class Batches:
    """One run over images."""

    def __init__(
        self,
        client: Client,
        job: Job,
        items: Sequence[Item],
        warn: Callable[[str], None],
        answer: Callable[[Job, Sequence[Item]], Answered | Refused] = answer,
    ) -> None:
        """`answer`: what a worker does with a batch."""
        self.client, self.job, self.warn, self._answer = client, job, warn, answer
        self.crew = Crew(client, warn)
        self._left, self._rest = len(items), iter(items)
        self._again: deque[Batch] = deque()  # of workers that refused or left, or that the scheduler forgot
        self._suspects: deque[Batch] = deque()
        self._running: dict[Future[Any], tuple[Batch, set[str]]] = {}  # and the workers that may do it
        self._ended: SimpleQueue[Future[Any]] = SimpleQueue()
        self._took: deque[float] = deque(maxlen=32)  # seconds an image, of the last batches
        self._lonely: float | None = None  # since when no worker is there
        self._stopped = False

    def stop(self) -> None:
        """Send nothing more; what is sent comes yet. May be called by a signal's handler."""
        self._stopped = True

    def records(self) -> Iterator[tuple[Item, dict[str, Any]]]:
        """The record of every image, once, in the order of completion.

        Raises:
            ClusterError: no worker can do the job, or the scheduler is gone and does not come back.
        """
        self.crew.gather()
        try:
            while self._send():
                future = self._next()
                if future is None:
                    yield from self._taken_back()
                elif future in self._running:
                    batch, _ = self._running.pop(future)
                    yield from self._outcome(future, batch)
        finally:
            with suppress(Exception):  # the scheduler may be gone; how the run ended is known
                self.client.cancel(list(self._running))
                self.client.run(release, self.job.name, workers=self.crew.look(), on_error="ignore")

    def _send(self) -> bool:
        """Send what the workers have room for; whether anything is running or left."""
        workers = self.crew.look() if is_reached(self.client) else []
        while len(self._running) < _SENT * len(workers) and (batch := self._take(len(workers))):
            future = self.client.submit(
                self._answer,
                self.job,
                batch.items,
                workers=workers,
                resources={RESOURCE: 1},
                retries=_RETRIES,
                pure=False,
            )
            self._running[future] = batch, set(workers)
            future.add_done_callback(self._ended.put)
        left = bool(self._left or self._again or self._suspects) and not self._stopped
        if left and not is_reached(self.client):
            self._wait_for_scheduler()
        elif left:
            self._wait_for_workers(workers)
        return bool(self._running) or left

    def _take(self, workers: int) -> Batch | None:
        if self._stopped:
            return None
        if self._again:
            return self._again.popleft()
        each = int(BATCH_S / max(median(self._took), 1e-6)) if self._took else 1
        size = max(1, min(each, MOST_IMAGES, self._left // (_TAIL * workers)))
        items = list(islice(self._rest, size))
        self._left -= len(items)
        if items:
            return Batch(items)
        return self._suspects.popleft() if self._suspects and not self._running else None

    def _next(self) -> Future[Any] | None:
        """A batch that has ended; None after a moment without one, in which workers may have come."""
        try:
            return self._ended.get(timeout=_LOOK_S)
        except Empty:
            return None

    def _taken_back(self) -> Iterator[tuple[Item, dict[str, Any]]]:
        """Batches whose workers have all left are sent to others; the records of those that workers died of."""
        there = set(self.crew.look())
        for future, (batch, workers) in list(self._running.items()):
            if there & workers or not is_reached(self.client):
                continue
            del self._running[future]
            self.client.cancel([future])
            if batch.losses < (1 if batch.suspect else _MOST_LOSSES):
                self._again.append(replace(batch, losses=batch.losses + 1))
            else:
                yield from self._killed(batch)

    def _outcome(self, future: Future[Any], batch: Batch) -> Iterator[tuple[Item, dict[str, Any]]]:
        if future.status == "cancelled":
            self._again.append(batch)
        elif future.status == "error":
            yield from self._failed(future.exception(), batch)
        else:
            try:
                found = future.result(timeout=_FETCH_S)
            except GONE:
                self._again.append(batch)
            except Exception as e:  # noqa: BLE001  (of the task: its worker has left since, and it was done again)
                yield from self._failed(e, batch)
            else:
                yield from self._answered(found, batch)

    def _answered(self, found: Answered | Refused, batch: Batch) -> Iterator[tuple[Item, dict[str, Any]]]:
        if isinstance(found, Refused):
            self._again.append(batch)
            self.crew.refuse(found.address, found.why)
            return
        self._took.append(found.seconds / len(batch.items))
        self.crew.met(found.worker)
        items = {item.key: item for item in batch.items}
        for record in found.records:
            yield items[record["path"]], record

    def _failed(self, e: BaseException | None, batch: Batch) -> Iterator[tuple[Item, dict[str, Any]]]:
        if isinstance(e, KilledWorker):
            yield from self._killed(batch)
        elif self.crew.review():
            self._again.append(batch)
        else:
            raise ClusterError(f"workers fail ({why(e) if e else 'no reason is known'}); run again to go on") from e

    def _killed(self, batch: Batch) -> Iterator[tuple[Item, dict[str, Any]]]:
        """Of a batch that workers died of, each image is sent alone when all others are done: what waited there dies
        with what was at work. An image that workers die of even then gets an error.
        """
        if not batch.suspect:
            self._suspects.extend(Batch([item], suspect=True) for item in batch.items)
            return
        (item,) = batch.items
        record = about(item.key, None, item.size, item.modified, self.job.settings)
        yield item, {**record, "error": "workers ended while they had it, also where they had nothing else"}

    def _wait_for_workers(self, workers: Sequence[str]) -> None:
        """Where none is there, say so, and wait.

        Raises:
            ClusterError: all refuse, or none has come for long.
        """
        if workers:
            self._lonely = None
            return
        if self.crew.all_refuse():
            self.crew.check()
        if self._lonely is None:
            self._lonely = time.monotonic()
            self.warn("no worker is there; waiting for one (Ctrl-C ends; what is written stays)")
        if time.monotonic() - self._lonely > RETURN_S:
            self.crew.check()

    def _wait_for_scheduler(self) -> None:
        """Until the client has reached it again by itself; workers come again by their own service.

        Raises:
            ClusterError: it does not come back.
        """
        address = self.client.scheduler.address if self.client.scheduler else "that was here"
        self.warn(f"the scheduler {address} is gone; waiting for it, then what was sent is sent again")
        until = time.monotonic() + RETURN_S
        while not is_reached(self.client):
            if self._stopped:
                return
            if self.client.status in ("closed", "closing") or time.monotonic() > until:
                raise ClusterError(f"the scheduler {address} is gone; what is written stays, run again to go on")
            time.sleep(0.2)
        self.crew.forget()
        self.warn("the scheduler is back")
