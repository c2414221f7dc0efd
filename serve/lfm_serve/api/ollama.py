"""The part of Ollama's API that Home Assistant, Frigate and others use: /api/chat, /api/generate, and what tells of the
model: /api/tags, /api/ps, /api/show, /api/version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from lfm_runtime.answer.reply import Reply
from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.sampling import Odds
from lfm_runtime.setup.memory import weights_on_disk
from lfm_runtime.setup.setup import Setup
from lfm_runtime.text.spec import ChatFormat

from lfm_serve.api.answers import logprobs, reason
from lfm_serve.api.chat import NOT_APPLIED, Asked, parse, typed
from lfm_serve.api.errors import ApiError, as_json
from lfm_serve.engine import Piece

VERSION = "0.13.0"
"""Of Ollama, whose API this is like: clients compare it with what they need."""
_NEVER = "2318-01-01T00:00:00Z"
"""When a model is unloaded that stays: Ollama's own answer to a negative keep_alive is as far."""
_OPTIONS = {
    "num_predict": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "seed": "seed",
    "stop": "stop",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_UNUSED = ("keep_alive", "think", "truncate", "shift", "options", "format", "stream", "model", "messages", "tools")
_OF_GENERATE = ("prompt", "system", "images")
_NOT_BUILT = {"suffix": "", "template": "", "raw": False, "context": []}
"""Of /api/generate, and the values that ask for nothing."""


def only_loads(body: Any) -> bool:
    """Whether a request of /api/chat or /api/generate only asks that the model be loaded: without any text or image."""
    return isinstance(body, dict) and not any(body.get(name) for name in ("messages", *_OF_GENERATE))


def parse_generate(body: Any) -> Asked:
    """Of /api/generate: one question, which is a conversation of one turn; raises ApiError as `parse_chat`."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    for name, nothing in _NOT_BUILT.items():
        if body.get(name) not in (None, nothing):
            raise ApiError(400, f"{name} is not built; send the conversation to /api/chat", "unsupported", name)
    system = typed(body, "system", str)
    turn = {"role": "user", "content": typed(body, "prompt", str) or "", "images": body.get("images")}
    rest = {name: value for name, value in body.items() if name not in (*_OF_GENERATE, *_NOT_BUILT, "tools")}
    return parse_chat({**rest, "messages": [*([{"role": "system", "content": system}] if system else []), turn]})


def parse_chat(body: Any) -> Asked:
    """Of /api/chat; raises ApiError where it is not a request of it. Written as OpenAI's, then read as those are."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    options = typed(body, "options", dict) or {}
    found: dict[str, Any] = {ours: _whole(options[theirs]) for theirs, ours in _OPTIONS.items() if theirs in options}
    if isinstance(found.get("max_tokens"), int) and found["max_tokens"] < 0:  # -1: no limit, -2: the context is
        found["max_tokens"] = -1
    for name, value in options.items():
        if name not in _OPTIONS:
            found[name if name in NOT_APPLIED else f"options.{name}"] = value
    form = typed(body, "format", str, dict)
    if isinstance(form, dict):
        found["response_format"] = {"type": "json_schema", "schema": form}
    elif form == "json":
        found["response_format"] = {"type": "json_object"}
    elif form:
        raise ApiError(400, f"format {form!r:.40} is not known; json, or a JSON schema", None, "format")
    stream = typed(body, "stream", bool)
    return _parse_as_named(
        {
            **{name: value for name, value in body.items() if name not in _UNUSED},
            **found,
            "messages": [_message(m, f"messages[{n}]") for n, m in enumerate(typed(body, "messages", list) or [])],
            "model": body.get("model"),
            "tools": body.get("tools"),
            "stream": True if stream is None else stream,
        }
    )


def _whole(value: Any) -> Any:
    """A whole number as one, where a client's language has floats alone."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _parse_as_named(body: Mapping[str, Any]) -> Asked:
    """What is refused is told by Ollama's names."""
    try:
        return parse(body)
    except ApiError as e:
        said = e.message
        for theirs, ours in _OPTIONS.items():
            said = re.sub(rf"\b{ours}\b", theirs, said)
        raise ApiError(e.status, said, e.code, e.param) from None


def _message(raw: Any, where: str) -> Any:
    """A message as OpenAI writes it: images, which stand beside the text here, come before it."""
    if not isinstance(raw, dict) or raw.get("images") is None:
        return raw
    images = typed(raw, "images", list) or []
    if not all(isinstance(image, str) for image in images):
        raise ApiError(400, f"{where}.images is not a list of texts in base64", None, where)
    parts: list[Any] = [{"type": "image_url", "image_url": image} for image in images]
    return {**raw, "content": [*parts, {"type": "text", "text": raw.get("content") or ""}]}


@dataclass(frozen=True)
class ChatLines:
    """The answer as one object, or as lines of JSON."""

    model: str
    media_type = "application/x-ndjson"

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The answer as one object."""
        text = self.text(reply.report.text, _calls(reply))
        return {**self._head(), **text, **_logprobs(reply, reply.odds), **_end(reply)}

    def loaded(self, *, stays: bool) -> dict[str, Any]:
        """What `only_loads` gets: the model is loaded always. `stays`: not asked to leave memory."""
        return {**self._head(), **self.text(""), "done": True, "done_reason": "load" if stays else "unload"}

    def text(self, text: str, calls: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Text as this route has it."""
        return {"message": {"role": "assistant", "content": text, **(calls or {})}}

    def first(self) -> bytes:
        """Nothing: the first line is of the first text."""
        return b""

    def piece(self, piece: Piece, reply: Reply) -> bytes:
        """A line of text."""
        return self._line({**self.text(piece.text), **_logprobs(reply, piece.odds), "done": False})

    def working(self) -> bytes:
        """A line without text: the format has no comments."""
        return self._line({**self.text(""), "done": False})

    def last(self, reply: Reply) -> bytes:
        """The line with the calls, if there are any, and that with the reason and the figures."""
        calls = self._line({**self.text("", _calls(reply)), "done": False}) if reply.calls else b""
        return calls + self._line({**self.text(""), **_logprobs(reply, reply.new_odds()), **_end(reply)})

    def failed(self, error: ApiError) -> bytes:
        """A line with the error."""
        return _json({"error": error.message})

    def _line(self, value: Mapping[str, Any]) -> bytes:
        return _json({**self._head(), **value})

    def _head(self) -> dict[str, Any]:
        return {"model": self.model, "created_at": datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")}


@dataclass(frozen=True)
class GenerateLines(ChatLines):
    """The same of /api/generate, where the text is no message."""

    def text(self, text: str, calls: Mapping[str, Any] | None = None) -> dict[str, Any]:  # noqa: ARG002
        """Text alone: this route has no tools."""
        return {"response": text}


def _json(value: Any) -> bytes:
    return as_json(value) + b"\n"


def _calls(reply: Reply) -> dict[str, Any]:
    calls = [{"function": {"name": call.name, "arguments": dict(call.arguments)}} for call in reply.calls]
    return {"tool_calls": calls} if calls else {}


def _logprobs(reply: Reply, odds: Sequence[Odds]) -> dict[str, Any]:
    return {"logprobs": logprobs(reply, odds)} if odds else {}


def _end(reply: Reply) -> dict[str, Any]:
    """Why it ended, and what it took, in nanoseconds."""
    report = reply.report
    ms = {name: value or 0.0 for name, value in report.timing_ms.items()}
    return {
        "done": True,
        "done_reason": reason(reply).replace("tool_calls", "stop"),
        "total_duration": round(ms["total"] * 1e6),
        "load_duration": 0,
        "prompt_eval_count": report.prompt_tokens,
        "prompt_eval_duration": round((ms["vision"] + ms["prefill"]) * 1e6),
        "eval_count": report.new_tokens,
        "eval_duration": round((ms["total"] - ms["ttft"]) * 1e6),
    }


def tag(name: str, setup: Setup) -> dict[str, Any]:
    """The model as a line of /api/tags; its size is that of the weights that are read."""
    bundle, variant = setup.bundle, setup.variant
    size = weights_on_disk(bundle, bundle.graphs_read(variant, setup.prefill))
    digest = bundle.manifest.source.weights if bundle.manifest else ""
    modified = datetime.fromtimestamp(bundle.folder.stat().st_mtime, timezone.utc).isoformat()
    details = _details(variant)
    return {"name": name, "model": name, "modified_at": modified, "size": size, "digest": digest, "details": details}


def running(name: str, setup: Setup, context: int) -> dict[str, Any]:
    """The model as a line of /api/ps: it stays loaded, and none of it lies in a GPU's memory."""
    return {**tag(name, setup), "expires_at": _NEVER, "size_vram": 0, "context_length": context}


def shown(bundle: Bundle, variant: str, context: int, chat: ChatFormat) -> dict[str, Any]:
    """The model as /api/show tells of it."""
    tools = ["tools"] if chat.takes_tools else []
    return {
        "modelfile": "",
        "parameters": "",
        "template": chat.template,
        "details": _details(variant),
        "model_info": {"general.architecture": "lfm2_vl", "lfm2_vl.context_length": context},
        "capabilities": ["completion", "vision", *tools],
        "modified_at": datetime.fromtimestamp(bundle.folder.stat().st_mtime, timezone.utc).isoformat(),
    }


def _details(variant: str) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "onnx",
        "family": "lfm2_vl",
        "families": ["lfm2_vl"],
        "parameter_size": "",
        "quantization_level": variant,
    }
