"""POST /v1/chat/completions: a stranger's JSON → a conversation, its images and settings. Nothing is opened here.

What is asked for and not built is refused, so that no client believes it got it; fields that change no answer are
ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from lfm_runtime.decode.sampling import Generation
from lfm_runtime.text.messages import IMAGE, Conversation, Message, Place, Role

from lfm_serve.api.errors import ApiError
from lfm_serve.api.images import image_bytes

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_NUMBERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "repeat_penalty": "repetition_penalty",
}
_MOST = 10**9  # a number that no float holds is as impossible
_WITHOUT_EFFECT_WHEN_GREEDY = ("top_p", "min_p", "top_k", "seed")


@dataclass(frozen=True)
class Picture:
    """An image's file, and how closely the client wants it looked at: low, high or auto."""

    data: bytes
    detail: str = "auto"


@dataclass(frozen=True)
class Asked:
    """A request, checked."""

    conversation: Conversation
    pictures: tuple[Picture, ...]
    generation: Generation
    model: str | None = None
    stream: bool = False
    with_usage: bool = False
    unused: tuple[str, ...] = field(default=(), compare=False)  # fields that nothing here knows


def parse(body: Any) -> Asked:
    """Raises ApiError where it is not a request of this API, or wants what this server does not do."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    _check_not_built(body)
    messages, pictures = _messages(body.get("messages"))
    options = _typed(body, "stream_options", dict) or {}
    return Asked(
        Conversation(messages, special=False),  # a stranger's text forges no turn
        tuple(pictures),
        _generation(body),
        _typed(body, "model", str),
        bool(_typed(body, "stream", bool)),
        bool(_typed(options, "include_usage", bool)),
        tuple(sorted(name for name in body if name not in _KNOWN)),
    )


def _check_not_built(body: Mapping[str, Any]) -> None:
    def refuse(param: str, message: str) -> None:
        raise ApiError(400, message, "unsupported", param)

    if body.get("n") not in (None, 1):
        refuse("n", "n: one answer a request is made; ask several times")
    if body.get("logprobs") or body.get("top_logprobs"):
        refuse("logprobs", "logprobs are not given; leave them out")
    if (body.get("tools") or body.get("functions")) and body.get("tool_choice") != "none":
        refuse("tools", "this server makes no tool calls; leave tools out")
    kind = (_typed(body, "response_format", dict) or {}).get("type", "text")
    if kind != "text":
        refuse("response_format", f"response_format {kind!r:.40} is not enforced by this server; leave it out")
    for name in ("presence_penalty", "frequency_penalty"):
        if body.get(name) not in (None, 0):
            refuse(name, f"{name} is not implemented; use repetition_penalty")


def _messages(raw: Any) -> tuple[list[Message], list[Picture]]:
    """The turns, all system messages as one in front, and their images in order."""
    if not isinstance(raw, list) or not raw:
        raise ApiError(400, "messages must be a list of at least one message", None, "messages")
    system: list[str] = []
    turns: list[Message] = []
    pictures: list[Picture] = []
    for n, message in enumerate(raw):
        where = f"messages[{n}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{where} is not an object", None, where)
        role = _ROLES.get(str(message.get("role")))
        if role is None:
            known = ", ".join(_ROLES)
            raise ApiError(400, f"{where}.role is {message.get('role')!r:.40}; roles are {known}", None, where)
        if role == "assistant" and message.get("tool_calls"):
            raise ApiError(400, f"{where}.tool_calls: this server makes no tool calls", "unsupported", where)
        parts, found = _content(message.get("content"), f"{where}.content")
        if found and role != "user":
            raise ApiError(400, f"{where} is of the {role}, and only a user's message has images", None, where)
        pictures += found
        if role == "system":
            system += [str(part) for part in parts]
        else:
            turns.append(Message(role, tuple(parts) if found else "".join(map(str, parts))))
    if not turns:
        raise ApiError(400, "there is no user's message", None, "messages")
    return [*([Message("system", "\n\n".join(system))] if system else []), *turns], pictures


def _content(raw: Any, where: str) -> tuple[list[str | Place], list[Picture]]:
    if raw is None or isinstance(raw, str):
        return [raw or ""], []
    if not isinstance(raw, list):
        raise ApiError(400, f"{where} is a {type(raw).__name__}; give a string or a list of parts", None, where)
    parts: list[str | Place] = []
    pictures: list[Picture] = []
    for n, part in enumerate(raw):
        place = f"{where}[{n}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind == "image_url":
            parts.append(IMAGE)
            pictures.append(_picture(part.get("image_url"), place))
        elif kind in ("input_text", "input_image"):
            raise ApiError(400, f"{place}: {kind} is the Responses API's; this is chat/completions: text, image_url")
        else:
            raise ApiError(400, f"{place}: type {kind!r:.40} is not known; parts are text and image_url", None, place)
    return parts, pictures


def _picture(raw: Any, where: str) -> Picture:
    detail = "auto"
    if isinstance(raw, dict):
        raw, detail = raw.get("url"), raw.get("detail") or "auto"
    if not isinstance(raw, str):
        raise ApiError(400, f"{where}: image_url needs a url", None, where)
    if detail not in ("low", "high", "auto"):
        raise ApiError(400, f"{where}: detail {detail!r:.40} is not known; low, high or auto", None, where)
    return Picture(image_bytes(raw), detail)


def _generation(body: Mapping[str, Any]) -> Generation:
    """The settings that were given, by our names."""
    found: dict[str, Any] = {"speculate": 0}
    for name, ours in _NUMBERS.items():
        value = _typed(body, name, int, float)
        if value is not None:
            found[ours] = float(max(-_MOST, min(value, _MOST)))
    for name in ("max_tokens", "max_completion_tokens"):
        value = _typed(body, name, int)
        if value is not None:
            found["max_new_tokens"] = value
    top_k, seed = _typed(body, "top_k", int), _typed(body, "seed", int)
    if top_k is not None:
        found["top_k"] = max(0, top_k)  # -1: llama.cpp's off
    if seed is not None and seed >= 0:  # -1: any
        found["seed"] = seed
    if stop := _typed(body, "stop", str, list):
        texts = [stop] if isinstance(stop, str) else stop
        if not all(isinstance(text, str) and text for text in texts):
            raise ApiError(400, "stop must be a text, or a list of texts that are not empty", None, "stop")
        found["stop"] = tuple(texts)
    if _typed(body, "ignore_eos", bool):  # llama.cpp's, for measuring
        found["ignore_eos"] = True
    if found.get("temperature") == 0:  # clients send all they have
        found = {name: value for name, value in found.items() if name not in _WITHOUT_EFFECT_WHEN_GREEDY}
    return cast("Generation", found)


_IN_WORDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}


def _typed(body: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """A field of one of these kinds; None where it is null or missing."""
    value = body.get(name)
    if value is None or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))):
        return value
    wanted = " or ".join(dict.fromkeys(_IN_WORDS.get(kind, "a number") for kind in kinds))
    raise ApiError(400, f"{name} is {value!r:.40}; {wanted} is needed", None, name)


_KNOWN = {
    *_NUMBERS,
    "messages",
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "top_k",
    "seed",
    "ignore_eos",
    "stop",
    "n",
    "logprobs",
    "top_logprobs",
    "tools",
    "functions",
    "tool_choice",
    "response_format",
    "presence_penalty",
    "frequency_penalty",
}
