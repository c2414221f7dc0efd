"""Connections that must begin a request within a time: uvicorn waits for headers without end."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Hurried(H11Protocol):
    """A connection that is closed where a request's headers take longer than `header_s`, or nothing comes at all for as
    long as a connection is kept that has had one.
    """

    header_s = 20.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hurry: asyncio.TimerHandle | None = None
        self._begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._within(self.timeout_keep_alive)

    def data_received(self, data: bytes) -> None:
        """Once a request has begun, its headers are due."""
        if self.conn.their_state is h11.IDLE and (self._hurry is None or not self._begun):
            self._within(self.header_s)
            self._begun = True
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._within(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing to wait for."""
        self._within(None)
        super().connection_lost(exc)

    def _within(self, seconds: float | None) -> None:
        if self._hurry:
            self._hurry.cancel()
        self._hurry = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
        self._begun = False
