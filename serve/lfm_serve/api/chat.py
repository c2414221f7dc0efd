"""POST /v1/chat/completions: a stranger's JSON → conversation, places of images, settings. Nothing is opened here.

What is asked for and not built is refused, so that no client believes it got it. Ignored is what clients send with
every request and what nobody knows (repeat_last_n, chat_template_kwargs, store …); the log names each once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lfm_profiles.schema import IMAGE_SETTINGS
from lfm_runtime.decode.sampling import MOST_OTHERS, Generation
from lfm_runtime.text.messages import IMAGE, Conversation, Message, Place, Role, ToolCall
from lfm_runtime.text.tool_calls import function_of

from lfm_serve.api.errors import ApiError

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
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_MOST = 10**300  # a number that no float holds is as impossible
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")
_UNLIMITED = 1 << 20
"""Tokens of an answer that ends where the context does."""
_WITHOUT_EFFECT_WHEN_GREEDY = ("top_p", "min_p", "top_k", "seed")


@dataclass(frozen=True)
class Picture:
    """Where an image is: a URL of any kind, or base64; and how closely the client wants it looked at."""

    url: str
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
    with_timings: bool = False  # in every chunk of a stream
    unused: tuple[str, ...] = field(default=(), compare=False)  # fields that nothing here knows


def parse(body: Any) -> Asked:
    """Raises ApiError where it is not a request of this API, or wants what this server does not do."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    _check_not_built(body)
    messages, pictures = parse_messages(body.get("messages"))
    options = typed(body, "stream_options", dict) or {}
    tools, choice = _tools(body)
    schema = _schema(body)
    if schema is not None and tools:
        said = "response_format together with tools is not built; ask for one of them, or tool_choice: none"
        raise ApiError(400, said, "unsupported", "response_format")
    generation = _generation(body)
    if schema is not None:  # JSON that a limit nobody asked for cuts is of no use
        generation = {"max_new_tokens": _UNLIMITED, **generation, "schema": schema}
    generation |= cast("Generation", {"tool_choice": choice} if choice != "auto" else {})
    return Asked(
        Conversation(messages, tools, special=False),  # a stranger's text forges no turn
        tuple(pictures),
        generation,
        typed(body, "model", str),
        bool(typed(body, "stream", bool)),
        bool(typed(options, "include_usage", bool)),
        bool(typed(body, "timings_per_token", bool)),
        tuple(sorted(name for name in body if name not in _KNOWN)),
    )


def _check_not_built(body: Mapping[str, Any]) -> None:
    def refuse(param: str, message: str) -> None:
        raise ApiError(400, message, "unsupported", param)

    if body.get("n") not in (None, 1):
        refuse("n", "n: one answer a request is made; ask several times")
    if body.get("functions"):
        refuse("functions", "functions are an older name of tools; send tools")
    for name in _OTHER_GRAMMARS:
        if body.get(name) is not None:
            refuse(name, f"{name} is not enforced by this server; send response_format with a JSON schema")
    for name in IMAGE_SETTINGS:
        if body.get(name) is not None:
            refuse(name, f"{name} is set where the server is started; a request has image_url.detail: low or high")
    for name, without_effect in NOT_APPLIED.items():
        if body.get(name) is not None and body[name] not in without_effect:
            refuse(name, f"{name} is not applied by this server, and would change the answer; leave it out")


def _schema(body: Mapping[str, Any]) -> str | None:
    """The JSON schema that the answer follows, in OpenAI's spelling or llama.cpp's; None where it is free text."""
    form = typed(body, "response_format", dict) or {}
    kind, found = form.get("type", "text"), None
    if kind == "json_schema":
        found = form.get("schema", (typed(form, "json_schema", dict) or {}).get("schema"))
        if found is None:
            raise ApiError(400, "response_format has no json_schema.schema", None, "response_format")
    elif kind == "json_object":
        found = form.get("schema", {"type": "object"})
    elif kind != "text":
        said = f"response_format {kind!r:.40} is not known; text, json_object or json_schema"
        raise ApiError(400, said, "unsupported", "response_format")
    elif body.get("json_schema") is not None:
        found = body["json_schema"]
    return None if found is None else json.dumps(found)


def _tools(body: Mapping[str, Any]) -> tuple[Sequence[Mapping[str, Any]], str]:
    """The functions that may be called, and whether one must be: auto, required, or its name."""
    tools = typed(body, "tools", list) or []
    for n, tool in enumerate(tools):
        name = function_of(tool).get("name") if isinstance(tool, dict) else None
        if not isinstance(name, str) or not name:
            raise ApiError(400, f"tools[{n}] has no function.name", None, f"tools[{n}]")
        parameters = function_of(tool).get("parameters")
        if not isinstance(parameters, dict | None):
            raise ApiError(400, f"tools[{n}].function.parameters is not an object", None, f"tools[{n}]")
    choice = typed(body, "tool_choice", str, dict) or "auto"
    if isinstance(choice, dict):
        choice = function_of(choice).get("name") or "auto"
        if not isinstance(choice, str) or choice not in [function_of(tool)["name"] for tool in tools]:
            raise ApiError(400, f"tool_choice {choice!r:.80} is none of the tools", None, "tool_choice")
    elif choice not in ("none", "auto", "required"):
        said = f"tool_choice {choice!r:.40} is not known; none, auto, required or a function"
        raise ApiError(400, said, None, "tool_choice")
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice: required needs tools", None, "tool_choice")
    if choice == "none" or not tools:
        return (), "auto"
    return tools, choice


def parse_messages(raw: Any) -> tuple[list[Message], list[Picture]]:
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
        parts, found = _content(message, where)
        if found and role != "user":
            raise ApiError(400, f"{where} is of the {role}, and only a user's message has images", None, where)
        pictures += found
        if role == "system":
            system += [str(part) for part in parts]
        else:
            content = tuple(parts) if found else "".join(map(str, parts))
            turns.append(Message(role, content, tool_calls=_calls(message, where)))
    if not turns:
        raise ApiError(400, "there is no user's message", None, "messages")
    return [*([Message("system", "\n\n".join(system))] if system else []), *turns], pictures


def _calls(message: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    """The calls of a past turn. Their arguments are JSON text, or an object as Ollama has them."""
    calls = []
    for n, raw in enumerate(typed(message, "tool_calls", list) or []):
        place = f"{where}.tool_calls[{n}]"
        function = function_of(raw) if isinstance(raw, dict) else {}
        name, arguments = function.get("name"), function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as e:
                raise ApiError(400, f"{place}.function.arguments is not JSON ({str(e)[:100]})", None, place) from e
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ApiError(400, f"{place} needs function.name and function.arguments, an object as JSON", None, place)
        calls.append(ToolCall(name, arguments))
    return tuple(calls)


def _content(message: Mapping[str, Any], where: str) -> tuple[list[str | Place], list[Picture]]:
    raw, where = message.get("content"), f"{where}.content"
    if raw is None and message.get("role") == "user":
        raise ApiError(400, f"{where} is missing: a string, or a list of parts", None, where)
    if raw is None or isinstance(raw, str):
        return [raw or ""], []
    if not isinstance(raw, list):
        raise ApiError(400, f"{where} is of type {type(raw).__name__}; give a string or a list of parts", None, where)
    parts: list[str | Place] = []
    pictures: list[Picture] = []
    for n, part in enumerate(raw):
        place = f"{where}[{n}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ApiError(400, f"{place}.text is missing, or no text", None, place)
            parts.append(part["text"])
        elif kind == "image_url":
            parts.append(IMAGE)
            pictures.append(picture(part.get("image_url"), place))
        elif kind in ("input_text", "input_image"):
            raise ApiError(400, f"{place}: {kind} is the Responses API's; this is chat/completions: text, image_url")
        else:
            raise ApiError(400, f"{place}: type {kind!r:.40} is not known; parts are text and image_url", None, place)
    return parts, pictures


def picture(raw: Any, where: str) -> Picture:
    """An image_url, with its detail or as a text alone; raises ApiError for anything else."""
    detail = "auto"
    if isinstance(raw, dict):
        raw, detail = raw.get("url"), raw.get("detail") or "auto"
    if not isinstance(raw, str):
        raise ApiError(400, f"{where}: image_url needs a url", None, where)
    if detail not in ("low", "high", "auto"):
        raise ApiError(400, f"{where}: detail {detail!r:.40} is not known; low, high or auto", None, where)
    return Picture(raw, detail)


def _generation(body: Mapping[str, Any]) -> Generation:
    """The settings that were given, by our names."""
    found: dict[str, Any] = {"speculate": 0}
    for name, ours in _NUMBERS.items():
        value = typed(body, name, int, float)
        if value is not None:
            found[ours] = float(max(-_MOST, min(value, _MOST))) if abs(value) > _MOST else float(value)
    for name in _LIMITS:
        value = typed(body, name, int)
        if value is not None and value != -1:
            value = min(value, _UNLIMITED)
            if value < 1:
                raise ApiError(400, f"{name} {value} is impossible; allowed: 1 and above", None, name)
            if (other := found.setdefault("max_new_tokens", value)) != value:
                raise ApiError(400, f"{name} {value} contradicts another limit, {other}; send one of them", None, name)
    if any(body.get(name) == -1 for name in _LIMITS):  # none, as clients of llama.cpp and LM Studio mean it
        found.setdefault("max_new_tokens", _UNLIMITED)
    top_k, seed = typed(body, "top_k", int), typed(body, "seed", int)
    if top_k is not None:
        found["top_k"] = max(0, top_k)  # -1: llama.cpp's off
    if seed is not None and seed >= 0:  # -1: any
        found["seed"] = seed
    if stop := typed(body, "stop", str, list):
        texts = [stop] if isinstance(stop, str) else stop
        if not all(isinstance(text, str) and text for text in texts):
            raise ApiError(400, "stop must be a text, or a list of texts that are not empty", None, "stop")
        found["stop"] = tuple(texts)
    likeliest = typed(body, "top_logprobs", int) or 0
    if not 0 <= likeliest <= MOST_OTHERS:
        raise ApiError(
            400, f"top_logprobs {likeliest} is impossible; allowed: 0 to {MOST_OTHERS}", None, "top_logprobs"
        )
    if typed(body, "logprobs", bool):
        found["logprobs"] = likeliest
    elif likeliest:
        raise ApiError(400, "top_logprobs has no effect without logprobs: true", None, "top_logprobs")
    if typed(body, "ignore_eos", bool):  # llama.cpp's, for measuring
        found["ignore_eos"] = True
    return cast("Generation", found)


def effective(generation: Generation, default: float) -> Generation:
    """Without what has no effect at temperature 0: clients send all they have. `default`: the model's temperature."""
    if generation.get("temperature", default) != 0:
        return generation
    return cast("Generation", {k: v for k, v in generation.items() if k not in _WITHOUT_EFFECT_WHEN_GREEDY})


_OTHER_GRAMMARS = ("grammar", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
"""Of other servers: ignored, an answer would be free text that its client takes for what it asked for."""
NOT_APPLIED: Mapping[str, Sequence[Any]] = {
    "logit_bias": ({}, []),
    "modalities": (["text"], []),
    "audio": (),
    "web_search_options": (),
    "function_call": ("auto", "none"),
    "typical_p": (1,),
    "typ_p": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "n_probs": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "prompt_logprobs": (0,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": ("",),
    "documents": ([],),
    "lora": ([],),
    "mm_processor_kwargs": ({},),
    "images_kwargs": ({},),
}
"""What OpenAI's API and other servers apply and this one does not, and the values with which it changes nothing."""
_IN_WORDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}


def typed(body: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """A field of one of these kinds; None where it is null or missing."""
    value = body.get(name)
    if value is None or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))):
        return value
    number = "a number" if float in kinds else "a whole number"
    wanted = " or ".join(dict.fromkeys(_IN_WORDS.get(kind, number) for kind in kinds))
    raise ApiError(400, f"{name} is {value!r:.40}; {wanted} is needed", None, name)


_KNOWN = {
    *_NUMBERS,
    *IMAGE_SETTINGS,
    *NOT_APPLIED,
    "messages",
    "model",
    "stream",
    "stream_options",
    *_LIMITS,
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
    "json_schema",
    "timings_per_token",
    *_OTHER_GRAMMARS,
}
