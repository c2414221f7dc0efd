"""A template's text → tokens, white space handled as Jinja does with trim_blocks and lstrip_blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lfm_runtime.text.chat_template.values import TemplateError


@dataclass(frozen=True)
class Token:
    """`kind` is name, string, number, operator, data, or begin/end of a tag; `value` its text or value."""

    kind: str
    value: Any
    line: int


_OPEN = re.compile(r"(.*?)(\{%|\{\{|\{#)([-+]?)", re.DOTALL)
_COMMENT_END = re.compile(r".*?(?:\+#\}|-#\}\s*|#\}\n?)", re.DOTALL)
_TAG_END = {"{%": re.compile(r"\+%\}|-%\}\s*|%\}\n?"), "{{": re.compile(r"-\}\}\s*|\}\}")}
_WORD = re.compile(
    r"(?P<space>\s+)|(?P<float>(?<!\.)\d+(?:\.\d+)?[eE][-+]?\d+|(?<!\.)\d+\.\d+)|(?P<integer>[1-9]\d*|0+)(?!\w)|(?P<name>[^\W\d]\w*)"
    r"|(?P<string>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<operator>//|\*\*|==|!=|>=|<=|[-+*/%~\[\](){}<>=.:|,;])",
    re.DOTALL,
)
_CLOSES = {"(": ")", "[": "]", "{": "}"}


def tokenize(source: str) -> Iterator[Token]:
    """All tokens in order; raises TemplateError for what cannot be read."""
    source = re.sub(r"\r\n|\r|\n", "\n", source)
    source = source.removesuffix("\n")
    at = 0
    while found := _OPEN.match(source, at):
        text, opening, sign = found.groups()
        if sign == "-":
            text = text.rstrip()
        elif (
            sign != "+" and opening != "{{"
        ):  # lstrip_blocks: white space alone before a block goes, back to the line's start
            start = text.rfind("\n") + 1
            if (start > 0 or at == 0 or source[at - 1] == "\n") and not text[start:].strip():
                text = text[:start]
        line = source.count("\n", 0, found.end()) + 1
        if text:
            yield Token("data", text, line)
        at = found.end()
        if opening == "{#":
            end = _COMMENT_END.match(source, at)
            if end is None:
                raise syntax(line, "a comment is not closed")
            at = end.end()
            continue
        yield Token("begin", opening, line)
        at, inner = _tag(source, at, _TAG_END[opening], line)
        yield from inner
        yield Token("end", opening, line)
    if at < len(source):
        yield Token("data", source[at:], source.count("\n") + 1)


def _tag(source: str, at: int, closing: re.Pattern[str], line: int) -> tuple[int, list[Token]]:
    """Return (where a tag ends, its tokens)."""
    tokens: list[Token] = []
    open_brackets: list[str] = []
    while True:
        if not open_brackets and (end := closing.match(source, at)):
            return end.end(), tokens
        found = _WORD.match(source, at)
        if found is None:
            raise syntax(
                line, f"{source[at : at + 20]!r} cannot be read" if at < len(source) else "a tag is not closed"
            )
        kind, text = str(found.lastgroup), found[0]
        if kind == "operator" and text in _CLOSES:
            open_brackets.append(_CLOSES[text])
        elif kind == "operator" and text in _CLOSES.values() and (not open_brackets or open_brackets.pop() != text):
            raise syntax(line, f"{text!r} matches no open bracket")
        value: Any = text
        if kind == "string":
            try:
                value = text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
            except UnicodeDecodeError as e:
                raise syntax(line, f"{text[:20]} has an invalid escape sequence") from e
        elif kind in ("integer", "float"):
            if len(text) > 100:
                raise syntax(line, "a number of more than 100 digits")
            kind, value = "number", int(text) if kind == "integer" else float(text)
        if kind != "space":
            tokens.append(Token(kind, value, line))
        at = found.end()


def syntax(line: int, what: str) -> TemplateError:
    """Return the error for a line of the template."""
    return TemplateError(f"chat template, line {line}: {what}")
