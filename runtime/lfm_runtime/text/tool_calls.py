"""Calls of tools as the family writes them between two special tokens: `[name(arg="v", n=2), other()]`, or as JSON.

Not Python's own parser: models write arguments that are reserved words (`from="x"`), numbers with zeros in front, and
JSON's true and null beside Python's True and None.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lfm_runtime.text.messages import ToolCall, mapped_strings

CALL_START, CALL_END = "<|tool_call_start|>", "<|tool_call_end|>"
_STRING = r"""(?:\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
_QUOTES_INSIDE = r"""(?P<quote>["'])(?:.*?)(?P=quote)(?=\s*(?:,\s*[\w.-]+\s*[=:]|,\s*["'\[{(\d-]|[)\]}:]))"""
"""A string whose own quotes are not escaped, as LFM2.5's template writes them: it ends where something else begins."""
_NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*(?:-\w+)*"
_TOKENS = [
    re.compile(
        rf"""\s*(?:
      (?P<string>{string})
    | (?P<number>[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<name>{_NAME})
    | (?P<mark>[\[\](){{}}:,;=])
    | (?P<end>\Z)
    )""",
        re.VERBOSE | re.DOTALL,
    )
    for string in (_STRING, _QUOTES_INSIDE)
]
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_DEEPEST = 64


def parse_calls(text: str, tools: Sequence[Mapping[str, Any]] = ()) -> tuple[ToolCall, ...]:
    """The calls in what a model wrote between the special tokens.

    Args:
        text: without these tokens.
        tools: JSON schemas of functions; where a call has arguments without names, the names are theirs.

    Raises:
        ValueError: it is neither form.
    """
    try:
        return _from_json(json.loads(text))
    except (ValueError, RecursionError):
        pass
    try:
        return _Calls(text, tools, _TOKENS[0]).all()
    except ValueError:
        return _Calls(text, tools, _TOKENS[1]).all()


def is_name(text: str) -> bool:
    """Whether a function or an argument of this name can stand in a call; JSON can have any."""
    return re.fullmatch(_NAME, text) is not None


def written(calls: Sequence[ToolCall], text: Callable[[str], str] = str) -> str:
    """Calls as a model would have written them, special tokens included. `text` is applied to every string in them."""
    parts = []
    for call in calls:
        arguments = mapped_strings(dict(call.arguments), text)
        parts.append(f"{text(call.name)}({', '.join(f'{name}={_value(v)}' for name, v in arguments.items())})")
    return f"{CALL_START}[{', '.join(parts)}]{CALL_END}"


def _value(value: Any) -> str:
    """As LFM2.5's template writes it."""
    if isinstance(value, str):
        return f'"{value}"'
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool: {"type": "function", "function": {…}}, or the function alone."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def _from_json(raw: Any) -> tuple[ToolCall, ...]:
    calls = []
    for one in raw if isinstance(raw, list) else [raw]:
        if not isinstance(one, dict):
            raise ValueError("a call is not an object")  # noqa: TRY004
        inner = function_of(one)
        name, arguments = inner.get("name"), inner.get("arguments", inner.get("parameters", {}))
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise ValueError("a call needs a name and arguments")  # noqa: TRY004
        calls.append(ToolCall(name, arguments))
    if not calls:
        raise ValueError("there is no call")
    return tuple(calls)


class _Calls:
    """A recursive-descent parser; one method for each thing in the grammar."""

    def __init__(self, text: str, tools: Sequence[Mapping[str, Any]], token: re.Pattern[str]) -> None:
        self._text, self._at, self._depth, self._token = text, 0, 0, token
        self._kind = self._value = ""
        self._names = {
            str(f.get("name")): list((f.get("parameters") or {}).get("properties") or {})
            for f in map(function_of, tools)
        }
        self._next()

    def all(self) -> tuple[ToolCall, ...]:
        """[call, call …], or one or several calls without brackets."""
        closing = "]" if self._skip("[") else ""
        calls = [self._call()]
        while self._skip(",") or self._skip(";") or (not closing and self._kind == "name"):
            if closing and self._is(closing):
                break
            calls.append(self._call())
        if closing:
            self._expect(closing)
        if self._kind != "end":
            raise ValueError(f"{self._value!r:.40} stands after the calls")
        return tuple(calls)

    def _call(self) -> ToolCall:
        name = self._expect(kind="name")
        self._expect("(")
        arguments: dict[str, Any] = {}
        names = iter(self._names.get(name, ()))
        while not self._skip(")"):
            if arguments:
                self._expect(",")
                if self._skip(")"):
                    break
            before = self._at, self._kind, self._value
            if self._kind == "name":
                argument = self._value
                self._next()
                if self._skip("=") or self._skip(":"):
                    arguments[argument] = self._anything()
                    continue
                self._at, self._kind, self._value = before
            value = self._anything()
            argument = next((n for n in names if n not in arguments), "")
            if not argument:
                raise ValueError(f"an argument of {name} has no name")
            arguments[argument] = value
        return ToolCall(name, arguments)

    def _anything(self) -> Any:
        kind, value = self._kind, self._value
        if kind == "string":
            return self._literal()
        if kind == "number":
            self._next()
            plain = value.replace("_", "")
            return float(plain) if re.search("[.eE]", plain) else int(plain)
        if kind == "name" and value in _WORDS:
            self._next()
            return _WORDS[value]
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        try:
            for opening, closing in ("[]", "()"):
                if self._skip(opening):
                    return self._listed(closing, self._anything)
            if self._skip("{"):
                return dict(self._listed("}", self._pair))
        finally:
            self._depth -= 1
        raise ValueError(f"{value!r:.40} is no value")

    def _pair(self) -> tuple[str, Any]:
        key = self._anything() if self._kind in ("string", "number") else self._expect(kind="name")
        if not (self._skip(":") or self._skip("=")):
            raise ValueError(f"a colon is missing after {key!r:.40}")
        return str(key), self._anything()

    def _listed(self, closing: str, parse: Callable[[], Any]) -> list[Any]:
        found: list[Any] = []
        while not self._skip(closing):
            if found:
                self._expect(",")
                if self._skip(closing):
                    break
            found.append(parse())
        return found

    def _literal(self) -> str:
        raw = self._value
        self._next()
        try:
            found = str(ast.literal_eval(raw))
        except (ValueError, SyntaxError):  # a line break or the string's own quotes
            return raw[1:-1]
        return found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON's pairs are one character

    def _next(self) -> None:
        match = self._token.match(self._text, self._at)
        if match is None:
            raise ValueError(f"{self._text[self._at : self._at + 20]!r} is not of a call")
        self._at = match.end()
        self._kind = next(kind for kind in ("string", "number", "name", "mark", "end") if match[kind] is not None)
        self._value = match[self._kind]

    def _is(self, mark: str) -> bool:
        return self._kind == "mark" and self._value == mark

    def _skip(self, mark: str) -> bool:
        found = self._is(mark)
        if found:
            self._next()
        return found

    def _expect(self, mark: str = "", kind: str = "mark") -> str:
        if self._kind != kind or (mark and self._value != mark):
            raise ValueError(f"{mark or kind} is expected where {self._value!r:.40} stands")
        value = self._value
        self._next()
        return value
