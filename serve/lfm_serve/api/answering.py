"""From a prompt to a response: queued, answered, streamed; and what becomes of it when its client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from lfm_runtime.answer.choice import Choice
from lfm_runtime.answer.reply import Job, Reply
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from lfm_serve.api.errors import ApiError, Json, of, too_late
from lfm_serve.api.metrics import Metrics
from lfm_serve.api.watched import Gone, Stream, until_gone
from lfm_serve.engine import Ended, Engine, Event, Failed, Piece, Request
from lfm_serve.limits import Limits


class Shape(Protocol):
    """How one API writes an answer."""

    media_type: str  # of a stream

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The answer as one object."""
        ...

    def first(self) -> bytes:
        """What a stream begins with."""
        ...

    def piece(self, piece: Piece, reply: Reply) -> bytes:
        """A part of a stream with some text."""
        ...

    def working(self) -> bytes:
        """A sign of life, where the format has one."""
        ...

    def last(self, reply: Reply) -> bytes:
        """What a stream ends with."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """What a stream ends with that cannot go on."""
        ...


@dataclass
class Waiting:
    """A request in the engine, and the events that come from there."""

    request: Request
    events: asyncio.Queue[Event | None]  # None: a time is over
    ends: float  # time.monotonic()

    async def next(self, at_most: float | None = None) -> Event | None:
        """The next event; None where it takes longer than `at_most` seconds.

        Raises:
            ApiError: the time for the whole request is over.
        """
        left = self.ends - time.monotonic()
        # A timer that puts something into the queue: asyncio.wait_for would make a task for every token.
        wake = asyncio.get_running_loop().call_later(
            max(0.0, left if at_most is None else min(left, at_most)), self.events.put_nowait, None
        )
        try:
            found = await self.events.get()
        finally:
            wake.cancel()
        if found is None and time.monotonic() >= self.ends:
            raise too_late()
        return found

    async def end(self) -> Event:
        """The last event.

        Raises:
            ApiError: the time for the whole request is over.
        """
        while (found := await self.next()) is None or isinstance(found, Piece):
            pass
        return found


class Answering:
    """The way of every request, whichever API it came by."""

    def __init__(self, engine: Engine, metrics: Metrics, limits: Limits) -> None:
        self._engine, self._metrics, self._limits = engine, metrics, limits

    async def answer(self, http: HttpRequest, job: Job, shape: Shape, *, stream: bool) -> Response:
        """The response with the answer, or a stream of it.

        Raises:
            ApiError, EdgeError: there is none.
        """
        waiting = self._queued(job, pieces=stream)
        if stream:
            parts = self._parts(waiting, job.reply, shape)
            return Stream(parts, lambda: self._left(waiting), shape.media_type)
        if await self._end(http, waiting) is None:
            return Response(status_code=499)
        self._metrics.answered(job.reply.report)
        return Json(shape.whole(job.reply))

    async def score(self, http: HttpRequest, asked: Sequence[Choice]) -> Ended | None:
        """The end of scoring given answers; None where nobody waits for it any more."""
        ended = await self._end(http, self._queued(asked, pieces=False))
        for one in (ended.chosen or ()) if ended else ():
            self._metrics.answered(one.report)
        return ended

    def _queued(self, work: Job | Sequence[Choice], *, pieces: bool) -> Waiting:
        """Put work into the engine's queue; `pieces`: somebody wants the text as it comes."""
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:  # in the engine's thread
            if not pieces and isinstance(event, Piece):
                return
            with suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(events.put_nowait, event)

        waiting = Waiting(Request(work, emit), events, time.monotonic() + self._limits.request_s)
        self._engine.submit(waiting.request)
        return waiting

    async def _end(self, http: HttpRequest, waiting: Waiting) -> Ended | None:
        """Wait for the end; None where the client leaves before."""
        try:
            found = await until_gone(waiting.end(), http.receive)
        except Gone:
            self._left(waiting)
            return None
        except ApiError:
            self._engine.cancel(waiting.request)
            raise
        if isinstance(found, Failed):
            raise found.error
        assert isinstance(found, Ended)
        return found

    async def _parts(self, waiting: Waiting, reply: Reply, shape: Shape) -> AsyncIterator[bytes]:
        """The parts of a stream; a sign of life every few seconds while nothing else is there to send."""
        yield shape.first()
        try:
            while True:
                found = await waiting.next(self._limits.ping_s)
                if found is None:
                    yield shape.working()
                elif isinstance(found, Piece):
                    yield shape.piece(found, reply)
                elif isinstance(found, Ended):
                    self._metrics.answered(reply.report)
                    yield shape.last(reply)
                    return
                else:
                    yield shape.failed(of(found.error))
                    return
        except ApiError as e:
            self._engine.cancel(waiting.request)
            yield shape.failed(e)

    def _left(self, waiting: Waiting) -> None:
        self._engine.cancel(waiting.request)
        self._metrics.cancelled.inc()
