"""Waiting for an answer while watching whether the client is still there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class Gone(Exception):  # noqa: N818  (an event, not a fault)
    """The client has closed its connection."""


async def until_gone(waited: Coroutine[Any, Any, T], receive: Receive) -> T:
    """What is waited for; raises Gone when the client goes first."""
    wanted = asyncio.ensure_future(waited)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({wanted, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise Gone
    finally:
        for task in (wanted, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """Parts that are sent as they come, each flushed. `gone` is called when the client has left before its end."""

    def __init__(self, parts: AsyncIterator[bytes], gone: Callable[[], None], media_type: str) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._parts, self._gone = parts, gone

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the parts as they come."""
        try:
            await until_gone(self._send(send), receive)
        except (Gone, OSError):
            self._gone()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
