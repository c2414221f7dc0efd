"""What is said: messages of text and images, calls of tools, a conversation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Literal

from lfm_runtime.errors import PromptError

Role = Literal["system", "user", "assistant", "tool"]


class Place(Enum):
    """A place in a message's content for something that is not text."""

    IMAGE = "image"


IMAGE = Place.IMAGE
"""The place of the next image within a message."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant made."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn. `content` is text, or texts and IMAGE places in their order."""

    role: Role
    content: str | tuple[str | Place, ...]
    thinking: str | None = None  # of an assistant's turn, where the template has a place of its own for it
    tool_calls: tuple[ToolCall, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a role that could be more than a role: templates write it as it is."""
        if not re.fullmatch("[a-z_]+", self.role):
            raise PromptError(f"{self.role!r} is not a role; roles are system, user, assistant and tool")
        parts = self.content if isinstance(self.content, tuple) else (self.content,)
        if wrong := [part for part in parts if not isinstance(part, (str, Place))]:
            raise PromptError(f"a text is a {type(wrong[0]).__name__} ({str(wrong[0])[:40]!r}); it must be a str")

    @staticmethod
    def user(text: str, images: int = 0) -> Message:
        """Return a user's turn with places for so many images before the text."""
        return Message("user", (IMAGE,) * images + (text,) if images else text)

    @property
    def images(self) -> int:
        """Number of places for images in the content."""
        return 0 if isinstance(self.content, str) else self.content.count(IMAGE)

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the content, in order, without places for images."""
        return (
            (self.content,)
            if isinstance(self.content, str)
            else tuple(part for part in self.content if isinstance(part, str))
        )

    def as_dict(
        self, text: Callable[[str], str] = str, written: Callable[[Sequence[ToolCall]], str] | None = None
    ) -> dict[str, Any]:
        """The turn as transformers' chat templates take it. `text` is applied to every string in it; `written` makes
        text of its calls, which then stands in front of the content.
        """
        content: Any = self.content
        if self.tool_calls and written and isinstance(content, str):
            content = written(self.tool_calls) + text(content)
        elif isinstance(content, str):
            content = text(content)
        else:
            content = [
                {"type": "image"} if part is IMAGE else {"type": "text", "text": text(str(part))} for part in content
            ]
        turn: dict[str, Any] = {"role": self.role, "content": content}
        if self.thinking is not None:
            turn["thinking"] = text(self.thinking)
        if self.tool_calls and not written:
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": text(call.name), "arguments": mapped_strings(dict(call.arguments), text)},
                }
                for call in self.tool_calls
            ]
        return turn


def mapped_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string in it changed. Keys too, but for identifiers: templates use them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            k if str(k).isidentifier() else mapped_strings(k, change): mapped_strings(v, change)
            for k, v in value.items()
        }
    return [mapped_strings(v, change) for v in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Conversation:
    """All that a prompt is made of, without the images themselves."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()  # JSON schemas of functions that the model may call
    now: datetime | None = None  # the date that a template with tools tells; by default today's
    special: bool = True  # False: text that spells a special token is text, so that it cannot forge a turn

    def __post_init__(self) -> None:
        """Refuse messages of another kind, such as transformers' dicts."""
        for message in self.messages:
            if not isinstance(message, Message):
                raise PromptError(
                    f"a message is a {type(message).__name__}; give lfm_runtime.Message values: "
                    'Message("user", (IMAGE, "What is this?"))'
                )
