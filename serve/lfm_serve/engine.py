"""One thread that owns the model. Requests wait in a queue, and join and leave the batch between its steps."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from lfm_runtime.answer.choice import Choice, Chosen
from lfm_runtime.answer.reply import Job
from lfm_runtime.batch import Batch, Scoring, Seat
from lfm_runtime.decode.sampling import Odds
from lfm_runtime.errors import EdgeError, counted
from lfm_runtime.model import Model
from lfm_runtime.setup.setup import Setup

_log = logging.getLogger(__name__)
_FAULT = "this is a fault of the server; see its log"


@dataclass(frozen=True)
class Piece:
    """Text that has become certain, and how likely its tokens were, where that was asked for."""

    text: str
    odds: Sequence[Odds] = ()


@dataclass(frozen=True)
class Ended:
    """The answer is whole, its report complete; given answers are scored."""

    chosen: list[Chosen] | None = None


@dataclass(frozen=True)
class Failed:
    """The answer ended for this reason."""

    error: EdgeError


Event: TypeAlias = Piece | Ended | Failed


@dataclass(eq=False)
class Request:
    """An answer that somebody waits for, or several given answers to be scored. `emit` is called in the engine's thread
    and must not block.
    """

    work: Job | Sequence[Choice]
    emit: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class QueueFullError(EdgeError):
    """As many requests wait as may."""


class Engine:
    """Load the model, then make the answers of the requests, at most `rows` at once."""

    def __init__(self, setup: Setup, *, rows: int, waiting: int, cache_mib: int) -> None:
        """Nothing is loaded yet. `waiting`: requests that may wait for a row; `cache_mib`: for prompts' beginnings and
        image features, which all requests share.
        """
        self.setup, self.rows = setup, rows
        self.model: Model | None = None
        self.failure: Exception | None = None
        self._most_waiting, self._cache_mib = waiting, cache_mib
        self._changed = threading.Condition()
        self._queue: deque[Request] = deque()
        self._seats: dict[Seat | Scoring, Request] = {}
        self._closing = False
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lfm-engine", daemon=True)

    @property
    def capacity(self) -> int:
        """Tokens of prompt and answer together that a request has room for."""
        return self.setup.context_length

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a row."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of requests that are being answered."""
        return len(self._seats)

    def start(self) -> None:
        """Begin to load the model; requests are taken once `model` is there."""
        self._thread.start()

    def wait_until_loaded(self) -> None:
        """Return once the model is loaded, or `failure` says why it is not."""
        self._loaded.wait()

    def wait_until_over(self) -> None:
        """Return once the thread has ended: after `close`, or where `failure` says why."""
        self._thread.join()

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            QueueFullError: as many wait as may.
        """
        with self._changed:
            if len(self._queue) + len(self._seats) >= self.rows + self._most_waiting:
                there = len(self._queue) + len(self._seats)
                raise QueueFullError(f"this server is busy with {counted(there, 'request')}; try again in a moment")
            self._queue.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """End a request that nobody wants any more: at once where it waits, else after the step that runs."""
        with self._changed:
            request.cancelled.set()
            if request in self._queue:
                self._queue.remove(request)
            self._changed.notify()

    def close(self) -> None:
        """Answer what is there, then end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            model = Model.of(self.setup, cache_mib=self._cache_mib)
            batch = Batch(model, self.rows, self.capacity)
            self.model = model  # from here on /health says that requests are answered
            self._loaded.set()
            with model.sessions.execution.pinned():
                while self._admit(batch):
                    for seat in batch.step():
                        self._tell(seat)
        except Exception as e:  # noqa: BLE001  (said by the main thread, which ends the process)
            self.model, self.failure = None, e
            with self._changed:
                for request in (*self._queue, *self._seats.values()):
                    request.emit(Failed(EdgeError(_FAULT)))
        finally:
            self._loaded.set()

    def _admit(self, batch: Batch) -> bool:
        """Let requests leave and join; wait while there is nothing to do. Returns False at the end."""
        with self._changed:
            while not (self._queue or self._seats or self._closing):
                self._changed.wait()
            for seat in [seat for seat, request in self._seats.items() if request.cancelled.is_set()]:
                batch.drop(seat)
                del self._seats[seat]
            if self._queue and batch.has_seat:
                request = self._queue.popleft()
                work = request.work
                self._seats[batch.add(work) if isinstance(work, Job) else batch.score(work)] = request
            return bool(self._queue or self._seats or not self._closing)

    def _tell(self, seat: Seat | Scoring) -> None:
        """Pass on what a step has made of an answer."""
        request = self._seats[seat]
        if seat.error:
            known = isinstance(seat.error, EdgeError)
            _log.error("lfm-edge: %s", seat.error, exc_info=None if known else seat.error)
            request.emit(Failed(seat.error if isinstance(seat.error, EdgeError) else EdgeError(_FAULT)))
        elif isinstance(seat, Seat) and seat.piece:
            request.emit(Piece(seat.piece, seat.job.reply.new_odds()))
        if seat.finished:
            if not seat.error:
                request.emit(Ended(seat.chosen if isinstance(seat, Scoring) else None))
            with self._changed:
                del self._seats[seat]
