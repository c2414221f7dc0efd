"""Every response is counted by its status, those of the guard too."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfm_serve.api.metrics import Metrics


class Counted:
    """Around an application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and note the status of its response."""

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, noted if scope["type"] == "http" else send)
