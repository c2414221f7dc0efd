"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lfm_runtime.errors import ContextFullError, EdgeError, ImageError, PromptError, SettingError
from starlette.responses import JSONResponse

from lfm_serve.engine import QueueFullError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def as_json(value: Any) -> bytes:
    """A value as JSON; half a character, which a request's JSON may hold, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class Json(JSONResponse):
    """A response of any value that a request may have brought."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return as_json(content)


@dataclass
class ApiError(Exception):
    """What a client gets instead of an answer."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON of the response, and of an event in a stream that has begun."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str) -> Json:
        """The whole response to a request of this path; Ollama's have its form."""
        body = {"error": self.message} if path.startswith("/api/") else self.body()
        return Json(body, self.status, headers=dict(self.headers))


def too_large(message: str) -> ApiError:
    """For what this device's memory cannot hold: clients that try again on every 503 are told not to."""
    return ApiError(503, message, "too_large_for_this_device", headers={"x-should-retry": "false"})


def refused_image(message: str) -> ApiError:
    """For an image that cannot be had."""
    return ApiError(400, message, "invalid_image", "messages")


def about(error: ApiError | EdgeError, param: str) -> ApiError:
    """An error, of this field of the request."""
    return replace(error if isinstance(error, ApiError) else of(error), param=param)


def too_late() -> ApiError:
    """For a request that took longer than --request-timeout: asked again, it would take as long."""
    return ApiError(
        504, "the answer took longer than this server allows", "timeout", headers={"x-should-retry": "false"}
    )


def loading() -> ApiError:
    """Before the model is there; in the words of llama.cpp's server, which clients wait for."""
    return ApiError(503, "Loading model", "unavailable_error", headers={"Retry-After": "1"})


def of(error: EdgeError) -> ApiError:
    """What a client is told of one of our errors."""
    said = str(error)
    if isinstance(error, QueueFullError):
        return ApiError(429, said, "queue_full", headers={"Retry-After": "1"})
    if isinstance(error, ContextFullError):
        limits = said.partition(";")[0]  # what follows is for who has the command line
        return ApiError(400, f"{limits}; shorten the text, or send fewer images", "context_length_exceeded", "messages")
    if isinstance(error, ImageError | PromptError):
        return ApiError(400, said, None, "messages")
    if isinstance(error, SettingError):
        if isinstance(error.__cause__, ImportError):  # a command to install it is for who has a shell here
            said = f"{said.partition(':')[0]}, which is not installed on this server"
        return ApiError(400, said)
    if isinstance(error, MemoryError):
        return too_large(said)
    return ApiError(500, said)
