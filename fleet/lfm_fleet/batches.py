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
from dataclasses import dataclass
from itertools import islice
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any

from distributed import Client, Future
from distributed.scheduler import KilledWorker
from lfm_serve.captions.making import about

from lfm_fleet.crew import RESOURCE, ClusterError, Crew, is_reached
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
_LOOK_S = 1.0
_RETURN_S = 120.0
"""How long a scheduler that is gone is waited for."""


@dataclass(frozen=True)
class Batch:
    """Images that are sent together."""

    items: Sequence[Item]


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
        self._again: deque[Batch] = deque()  # of workers that refused or died, or that the scheduler forgot
        self._running: dict[Future[Any], Batch] = {}
        self._ended: SimpleQueue[Future[Any]] = SimpleQueue()
        self._took: deque[float] = deque(maxlen=32)  # seconds an image, of the last batches
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
                    continue
                batch = self._running.pop(future)
                yield from self._outcome(future, batch)
        finally:
            with suppress(Exception):  # the scheduler may be gone
                self.client.cancel(list(self._running))
                self.client.run(release, self.job.name, on_error="ignore")

    def _send(self) -> bool:
        """Send what the workers have room for; whether anything is running or left."""
        workers = self.crew.look() if is_reached(self.client) else []
        while len(self._running) < _SENT * len(workers) and (batch := self._take(len(workers))):
            future = self.client.submit(
                self._answer, self.job, batch.items, resources={RESOURCE: 1}, retries=_RETRIES, pure=False
            )
            self._running[future] = batch
            future.add_done_callback(self._ended.put)
        if self._running:
            return True
        if self._stopped or not (self._again or self._left):
            return False
        self.crew.check() if is_reached(self.client) else self._wait_for_scheduler()
        return True

    def _take(self, workers: int) -> Batch | None:
        if self._again:
            return self._again.popleft()
        if self._stopped:
            return None
        each = int(BATCH_S / max(median(self._took), 1e-6)) if self._took else 1
        size = max(1, min(each, MOST_IMAGES, self._left // (_TAIL * workers)))
        items = list(islice(self._rest, size))
        self._left -= len(items)
        return Batch(items) if items else None

    def _next(self) -> Future[Any] | None:
        """A batch that has ended; None after a moment without one, in which workers may have come."""
        try:
            return self._ended.get(timeout=_LOOK_S)
        except Empty:
            return None

    def _outcome(self, future: Future[Any], batch: Batch) -> Iterator[tuple[Item, dict[str, Any]]]:
        if future.status == "finished":
            yield from self._answered(future.result(), batch)
        elif future.status == "cancelled":
            self._again.append(batch)
            if not is_reached(self.client):
                self._wait_for_scheduler()
        else:
            yield from self._failed(future.exception(), batch)

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
        """A batch that workers died of is done image by image; an image that they die of gets an error."""
        if isinstance(e, KilledWorker) and len(batch.items) > 1:
            self._again.extend(Batch([item]) for item in batch.items)
        elif isinstance(e, KilledWorker):
            (item,) = batch.items
            record = about(item.key, None, item.size, item.modified, self.job.settings)
            yield item, {**record, "error": f"{e.allowed_failures + 1} workers in turn ended while they had it"}
        elif self.crew.review():
            self._again.append(batch)
        else:
            raise ClusterError(f"workers fail ({why(e) if e else 'no reason is known'}); run again to go on") from e

    def _wait_for_scheduler(self) -> None:
        """Until the client has reached it again by itself; workers come again by their own service.

        Raises:
            ClusterError: it does not come back.
        """
        address = self.client.scheduler.address if self.client.scheduler else "that was here"
        self.warn(f"the scheduler {address} is gone; waiting for it, then what was sent is sent again")
        until = time.monotonic() + _RETURN_S
        while not is_reached(self.client):
            if self._stopped:
                return
            if self.client.status in ("closed", "closing") or time.monotonic() > until:
                raise ClusterError(f"the scheduler {address} is gone; what is written stays, run again to go on")
            time.sleep(0.2)
        self.crew.forget()
        self.crew.gather()
        self.warn("the scheduler is back")
