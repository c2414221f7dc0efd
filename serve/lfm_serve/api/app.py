"""The routes, and the way of a request through them: parse, open its images, queue, answer. One page, top to bottom."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import anyio
from lfm_runtime import __version__
from lfm_runtime.answer.reply import Job
from lfm_runtime.errors import EdgeError, ImageError
from lfm_runtime.images.layout import lay_out
from lfm_runtime.images.opened import CutImage, OpenedImage
from lfm_runtime.images.pixels import image_size, open_image
from lfm_runtime.model import Model
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from lfm_serve.api.answering import Answering
from lfm_serve.api.answers import Completion
from lfm_serve.api.chat import Asked, Picture, effective, parse
from lfm_serve.api.choose import parse_choose, response
from lfm_serve.api.errors import ApiError, Json, about, loading, of, refused_image, too_large
from lfm_serve.api.images import image_bytes
from lfm_serve.api.metrics import Metrics
from lfm_serve.api.ollama import VERSION as OLLAMA_VERSION
from lfm_serve.api.ollama import ChatLines, GenerateLines, only_loads, parse_chat, parse_generate, running, shown, tag
from lfm_serve.engine import Engine
from lfm_serve.limits import FEW_IMAGE_TOKENS, Limits, free_mib, image_mib
from lfm_serve.page import page

_log = logging.getLogger(__name__)
_NO_LIMIT = 1e12
_MOST_TOLD = 100
"""Names of unused fields that the log has; strangers can make up any number."""


class Api:
    """The application's state: the engine, what it is called, and what a request may be."""

    def __init__(self, engine: Engine, name: str, limits: Limits) -> None:
        """`name`: the model's id for clients."""
        self.engine, self.name, self.limits = engine, name, limits
        self.metrics = Metrics(engine)
        self._answering = Answering(engine, self.metrics, limits)
        self._opening = anyio.CapacityLimiter(1)  # one image is decoded at a time, which bounds its memory
        self._told: set[str] = set()  # unused fields that the log has named

    def application(self) -> Starlette:
        """All routes, OpenAI's with and without /v1."""

        def both(path: str, endpoint: Callable[..., Any], method: str) -> list[Route]:
            return [Route(prefix + path, endpoint, methods=[method]) for prefix in ("", "/v1")]

        routes = [
            *both("/chat/completions", self.chat, "POST"),
            *both("/choose", self.choose, "POST"),
            *both("/models", self.models, "GET"),
            *both("/models/{name:path}", self.model, "GET"),
            *both("/health", self.health, "GET"),
            Route("/metrics", self.metrics.page, methods=["GET"]),
            Route("/props", self.props, methods=["GET"]),
            Route("/api/chat", self.ollama_chat, methods=["POST"]),
            Route("/api/generate", self.ollama_generate, methods=["POST"]),
            Route("/api/ps", self.ollama_ps, methods=["GET"]),
            Route("/api/tags", self.ollama_tags, methods=["GET"]),
            Route("/api/version", self.ollama_version, methods=["GET"]),
            Route("/api/show", self.ollama_show, methods=["POST"]),
            Route("/", page, methods=["GET"]),
        ]
        handlers = {HTTPException: _http_error, ApiError: _api_error, EdgeError: _edge_error, Exception: _our_bug}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def chat(self, request: HttpRequest) -> Response:
        """Answer a conversation, as OpenAI does."""
        asked = parse(await self._body(request))
        job, images = await self._prepared(asked)
        shape = Completion(
            self.name, [image.size for image in images], with_usage=asked.with_usage, with_timings=asked.with_timings
        )
        return await self._answering.answer(request, job, shape, stream=asked.stream)

    async def ollama_chat(self, request: HttpRequest) -> Response:
        """Answer a conversation, as Ollama does."""
        return await self._as_ollama(request, parse_chat, ChatLines(self.name))

    async def ollama_generate(self, request: HttpRequest) -> Response:
        """Answer one question, as Ollama does."""
        return await self._as_ollama(request, parse_generate, GenerateLines(self.name))

    async def _as_ollama(self, request: HttpRequest, parse: Callable[[Any], Asked], shape: ChatLines) -> Response:
        body = await self._body(request)
        if only_loads(body):
            self._loaded()
            return Json(shape.loaded(stays=body.get("keep_alive") != 0))
        asked = parse(body)
        job, _ = await self._prepared(asked)
        return await self._answering.answer(request, job, shape, stream=asked.stream)

    async def choose(self, request: HttpRequest) -> Response:
        """Score given answers."""
        asked = parse_choose(await self._body(request))
        self._tell_unused(asked.unused)
        model = self._loaded()
        self._check_name(asked.model)
        try:
            images = await self._opened(model, asked.pictures)
        except (ApiError, ImageError) as e:
            raise about(e, "images") from e
        choices = await run_in_threadpool(asked.prepared, model, images)
        ended = await self._answering.score(request, choices)
        return Json(response(self.name, asked, ended.chosen or [])) if ended else Response(status_code=499)

    async def _prepared(self, asked: Asked) -> tuple[Job, list[CutImage]]:
        """Open the images and render the prompt: all that a bad request can fail with, before it is queued."""
        model = self._loaded()
        self._check_name(asked.model)
        self._tell_unused(asked.unused)
        images = await self._opened(model, asked.pictures)
        generation = effective(asked.generation, model.setup.generation.temperature)
        job = await run_in_threadpool(model.prepare_answer, asked.conversation, images, **generation)
        return job, images

    async def _opened(self, model: Model, pictures: Sequence[Picture]) -> list[CutImage]:
        if not pictures and "images" not in self._told:
            self._told.add("images")
            _log.info("lfm-edge: a request had no image; some clients drop attachments without a word")
        found = []
        for picture in pictures:
            data = await run_in_threadpool(image_bytes, picture.url, self.limits)
            found.append(await anyio.to_thread.run_sync(self._open, model, data, picture.detail, limiter=self._opening))
        return found

    def _open(self, model: Model, data: bytes, detail: str) -> CutImage:
        """Decode an image and cut it into the views that the model sees; refused where memory would not suffice."""
        width, height = image_size(data, max_megapixels=_NO_LIMIT)
        if width * height > self.limits.max_megapixels * 1e6:
            said = f"an image of {width}×{height} pixels is larger than the {self.limits.max_megapixels:g} megapixels"
            raise refused_image(f"{said} that this server takes; send it smaller")
        needed, free = image_mib(width, height), free_mib()
        if free is not None and needed > free:
            said = f"an image of {width}×{height} takes {needed:.0f} MiB to open, {free} MiB are free on this device"
            raise too_large(f"{said}; send it smaller")
        settings = model.setup.images
        if detail == "low":
            least, most = (min(n, FEW_IMAGE_TOKENS) for n in (settings.min_image_tokens, settings.max_image_tokens))
            settings = replace(settings, do_image_splitting=False, min_image_tokens=least, max_image_tokens=most)
        image = open_image(data, max_megapixels=self.limits.max_megapixels)
        return OpenedImage(image, lay_out(image.width, image.height, settings), settings).cut()

    async def models(self, _: HttpRequest) -> Response:
        """Return the list of models: one."""
        return Json({"object": "list", "data": [self._entry()]})

    async def model(self, request: HttpRequest) -> Response:
        """Return the one model."""
        self._check_name(request.path_params["name"], strict=True)
        return Json(self._entry())

    async def health(self, _: HttpRequest) -> Response:
        """Whether requests are answered; without a key."""
        self._loaded()
        return Json({"status": "ok"})

    async def props(self, _: HttpRequest) -> Response:
        """What llama.cpp's server tells of itself, as far as Frigate asks for it."""
        model = self._loaded()
        chat = model.prompts.spec.chat
        return Json(
            {
                "default_generation_settings": {"n_ctx": self.engine.capacity},
                "total_slots": self.engine.rows,
                "model_alias": self.name,
                "modalities": {"vision": True, "audio": False},
                "chat_template": chat.template,
                "chat_template_caps": {"supports_tools": chat.takes_tools},
            }
        )

    async def ollama_tags(self, _: HttpRequest) -> Response:
        """Return Ollama's list of models: one."""
        setup = self.engine.setup
        return Json({"models": [tag(self.name, setup)]})

    async def ollama_ps(self, _: HttpRequest) -> Response:
        """Return Ollama's list of loaded models: the one."""
        self._loaded()
        return Json({"models": [running(self.name, self.engine.setup, self.engine.capacity)]})

    async def ollama_version(self, _: HttpRequest) -> Response:
        """Return the version of Ollama whose API this is like."""
        return Json({"version": OLLAMA_VERSION})

    async def ollama_show(self, request: HttpRequest) -> Response:
        """What the one model is and can."""
        body = await self._body(request)
        named = body.get("model") or body.get("name") if isinstance(body, dict) else None
        if self.limits.strict_model and named != self.name:
            raise ApiError(404, f"there is no model {named!r:.100}; this server has {self.name}")
        setup, model = self.engine.setup, self._loaded()
        return Json(shown(setup.bundle, setup.variant, self.engine.capacity, model.prompts.spec.chat))

    def _entry(self) -> dict[str, Any]:
        """The model as different clients look for its context size and abilities."""
        context = self.engine.capacity
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": f"lfm-edge {__version__}",
            "aliases": [],  # other names: Frigate lists them beside the id
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

    def _tell_unused(self, unused: Sequence[str]) -> None:
        new = [name for name in unused if name not in self._told][: _MOST_TOLD - len(self._told)]
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
            raise ApiError(400, f"the body is not JSON ({str(e).partition('; use sys.')[0][:200]})") from e


async def _api_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _edge_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, EdgeError)
    return of(error).response(request.url.path)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what, path = f"{request.method} {request.url.path}"[:200], request.url.path
    ollamas = "; of Ollama's API there are /api/chat, /api/generate, /api/tags, /api/ps, /api/show and /api/version"
    said = {
        404: f"there is no {what}{ollamas if path.startswith('/api/') else ''}",
        405: f"{what} is not a method of this path; it has {(error.headers or {}).get('Allow', 'another')}",
    }
    return ApiError(error.status_code, said.get(error.status_code, str(error.detail))).response(path)


async def _our_bug(request: HttpRequest, error: Exception) -> Response:
    said = f"{type(error).__name__}: this is a fault of the server; see its log"
    return ApiError(500, said).response(request.url.path)
