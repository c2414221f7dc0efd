"""The routes, and the way of a request through them: parse, open its images, queue, answer. One page, top to bottom."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import anyio
from lfm_runtime import __version__
from lfm_runtime.answer.reply import Job
from lfm_runtime.errors import EdgeError
from lfm_runtime.images.layout import lay_out
from lfm_runtime.images.opened import CutImage, OpenedImage
from lfm_runtime.images.pixels import image_size, open_image
from lfm_runtime.model import Model
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lfm_serve.api.answers import Shape, event
from lfm_serve.api.chat import Asked, Picture, parse
from lfm_serve.api.errors import ApiError, loading, of, too_large
from lfm_serve.api.metrics import Metrics
from lfm_serve.api.watched import EventStream, Gone, until_gone
from lfm_serve.engine import Ended, Engine, Event, Failed, Piece, Request
from lfm_serve.limits import FEW_IMAGE_TOKENS, Limits, free_mib, image_mib

_log = logging.getLogger(__name__)
_MOST_TOLD = 100
"""Names of unused fields that the log has; strangers can make up any number."""


class Api:
    """The application's state: the engine, what it is called, and what a request may be."""

    def __init__(self, engine: Engine, name: str, limits: Limits) -> None:
        """`name`: the model's id for clients."""
        self.engine, self.name, self.limits = engine, name, limits
        self.metrics = Metrics(engine)
        self._opening = anyio.CapacityLimiter(1)  # one image is decoded at a time, which bounds its memory
        self._told: set[str] = set()  # unused fields that the log has named

    def application(self) -> Starlette:
        """All routes, with and without /v1."""

        def both(path: str, endpoint: Callable[..., Any], method: str) -> list[Route]:
            return [Route(prefix + path, endpoint, methods=[method]) for prefix in ("", "/v1")]

        routes = [
            *both("/chat/completions", self.chat, "POST"),
            *both("/models", self.models, "GET"),
            *both("/models/{name:path}", self.model, "GET"),
            *both("/health", self.health, "GET"),
            Route("/metrics", self.metrics.page, methods=["GET"]),
        ]
        handlers = {HTTPException: _http_error, ApiError: _api_error, EdgeError: _edge_error, Exception: _our_bug}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def chat(self, request: HttpRequest) -> Response:
        """Answer a conversation."""
        model = self._loaded()
        asked = parse(await self._body(request))
        self._check_name(asked.model)
        self._tell_unused(asked)
        job = await anyio.to_thread.run_sync(self._prepare, model, asked, limiter=self._opening)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:  # in the engine's thread
            with suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(events.put_nowait, event)

        queued = Request(job, emit)
        self.engine.submit(queued)
        shape = Shape(self.name)
        if asked.stream:
            return EventStream(self._stream(events, queued, shape, asked), lambda: self._gone(queued))
        try:
            while isinstance(found := await until_gone(events.get(), request.receive), Piece):
                pass
        except Gone:
            self._gone(queued)
            return Response(status_code=499)
        if isinstance(found, Failed):
            raise found.error
        self.metrics.answered(job.reply.report)
        return JSONResponse(shape.whole(job.reply.report))

    async def _stream(
        self, events: asyncio.Queue[Event], queued: Request, shape: Shape, asked: Asked
    ) -> AsyncIterator[bytes]:
        """The parts of a stream; a comment every few seconds while nothing else is there to send."""
        report = queued.job.reply.report
        yield shape.first()
        while True:
            try:
                found = await asyncio.wait_for(events.get(), self.limits.ping_s)
            except asyncio.TimeoutError:
                yield b": working\n\n"
                continue
            if isinstance(found, Piece):
                yield shape.piece(found.text)
            elif isinstance(found, Ended):
                self.metrics.answered(report)
                yield shape.last(report, with_usage=asked.with_usage)
                return
            else:
                yield event(of(found.error).body())
                return

    def _prepare(self, model: Model, asked: Asked) -> Job:
        """Open the images and render the prompt: all that a bad request can fail with, before it is queued."""
        images = [self._open(model, picture) for picture in asked.pictures]
        return model.prepare_answer(asked.conversation, images, **asked.generation)

    def _open(self, model: Model, picture: Picture) -> CutImage:
        """Decode an image and cut it into the views that the model sees; refused where memory would not suffice."""
        width, height = image_size(picture.data, max_megapixels=self.limits.max_megapixels)
        needed, free = image_mib(width, height), free_mib()
        if free is not None and needed > free:
            said = f"an image of {width}×{height} takes {needed:.0f} MiB to open, {free} MiB are free on this device"
            raise too_large(f"{said}; send it smaller")
        settings = model.setup.images
        if picture.detail == "low":
            least, most = (min(n, FEW_IMAGE_TOKENS) for n in (settings.min_image_tokens, settings.max_image_tokens))
            settings = replace(settings, do_image_splitting=False, min_image_tokens=least, max_image_tokens=most)
        image = open_image(picture.data, max_megapixels=self.limits.max_megapixels)
        return OpenedImage(image, lay_out(image.width, image.height, settings), settings).cut()

    def _gone(self, queued: Request) -> None:
        self.engine.cancel(queued)
        self.metrics.cancelled.inc()

    async def models(self, _: HttpRequest) -> Response:
        """Return the list of models: one."""
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def model(self, request: HttpRequest) -> Response:
        """Return the one model."""
        self._check_name(request.path_params["name"], strict=True)
        return JSONResponse(self._entry())

    async def health(self, _: HttpRequest) -> Response:
        """Whether requests are answered; without a key."""
        self._loaded()
        return JSONResponse({"status": "ok"})

    def _entry(self) -> dict[str, Any]:
        """The model as different clients look for its context size and abilities."""
        context = self.engine.capacity
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": f"lfm-edge {__version__}",
            "aliases": [self.name],
            "max_model_len": context,
            "meta": {"n_ctx": context},
            "architecture": {"input_modalities": ["text", "image"], "output_modalities": ["text"]},
        }

    def _loaded(self) -> Model:
        if self.engine.model is None:
            raise loading()
        return self.engine.model

    def _check_name(self, name: str | None, *, strict: bool = False) -> None:
        """Any name is answered by the one model, as clients have names built in, unless --strict-model."""
        if (strict or self.limits.strict_model) and name not in (None, self.name):
            raise ApiError(404, f"there is no model {name!r:.100}; this server has {self.name}", "model_not_found")

    def _tell_unused(self, asked: Asked) -> None:
        new = [name for name in asked.unused if name not in self._told][: _MOST_TOLD - len(self._told)]
        if new:
            self._told.update(new)
            _log.info("lfm-edge: ignored in requests: %s", ", ".join(f"{name:.40}" for name in new))

    async def _body(self, request: HttpRequest) -> Any:
        """The JSON of a request, up to the limit; a client that sends it slower than the limit is let go."""
        most = self.limits.max_body_mib << 20
        body = io.BytesIO()
        try:
            with anyio.fail_after(self.limits.body_s):
                async for part in request.stream():
                    body.write(part)
                    if body.tell() > most:
                        said = f"the body has more than {most >> 20} MiB; send smaller images"
                        raise ApiError(413, said, "too_large")
        except TimeoutError as e:
            raise ApiError(408, f"the body did not come within {self.limits.body_s:g} s") from e
        except ClientDisconnect as e:
            raise ApiError(400, "the connection was closed") from e
        try:
            return await run_in_threadpool(json.loads, body.getvalue())
        except (ValueError, RecursionError) as e:
            raise ApiError(400, f"the body is not JSON ({str(e)[:200]})") from e


async def _api_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _edge_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, EdgeError)
    return of(error).response()


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    said = {404: f"there is no {what[:200]}", 405: f"{what[:200]} is not a method of this path"}
    return ApiError(error.status_code, said.get(error.status_code, str(error.detail))).response()


async def _our_bug(_: HttpRequest, error: Exception) -> Response:
    return ApiError(500, f"{type(error).__name__}: this is a fault of the server; see its log").response()
