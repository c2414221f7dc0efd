"""Calls of tools: what models write, against Python's own parser and json; the family's templates; anything at all."""

from __future__ import annotations

import ast
import json
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lfm_runtime.answer.reply import Reply
from lfm_runtime.decode.sampling import GenerationSettings
from lfm_runtime.errors import PromptError
from lfm_runtime.report import Report
from lfm_runtime.text.messages import Conversation, Message, ToolCall
from lfm_runtime.text.spec import ChatFormat
from lfm_runtime.text.tokenizer import Tokenizer, Vocabulary, byte_alphabet
from lfm_runtime.text.tool_calls import CALL_END, CALL_START, parse_calls, written

SPELLINGS = Path(__file__).resolve().parents[3] / "scripts" / "bench" / "spellings"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"p": {}, "q": {}}}}}]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[get_weather(city="Bern", n=2)]', [("get_weather", {"city": "Bern", "n": 2})]),
        ("a.b(x='it\\'s', y={\"k\": [1, None, true], 'z': {}})", [("a.b", {"x": "it's", "y": {"k": [1, None, True], "z": {}}})]),
        ('[f(from="x", class=True, n=007, m=-1.5e3)]', [("f", {"from": "x", "class": True, "n": 7, "m": -1500.0})]),
        ("[f(), g(a=1),]", [("f", {}), ("g", {"a": 1})]),
        ("f(a=1); g(b=2)", [("f", {"a": 1}), ("g", {"b": 2})]),
        ('f(1, "x")', [("f", {"p": 1, "q": "x"})]),
        ('f(x="a\nb")', [("f", {"x": "a\nb"})]),
        ('[say(text="he said "hi", then left", to="bo")]', [("say", {"text": 'he said "hi", then left', "to": "bo"})]),
        ('[say(text="a "b"")]', [("say", {"text": 'a "b"'})]),
        ('[f(a="")]', [("f", {"a": ""})]),
        ("f(x=(1, 2), y=null)", [("f", {"x": [1, 2], "y": None})]),
        ("file-read(path='/a', max-bytes=1_000)", [("file-read", {"path": "/a", "max-bytes": 1000})]),
        ('[{"name": "f", "arguments": {"a": 1}}]', [("f", {"a": 1})]),
        ('{"type": "function", "function": {"name": "f", "arguments": {}}}', [("f", {})]),
    ],
)  # fmt: skip
def test_what_models_write(text, wanted) -> None:
    assert parse_calls(text, TOOLS) == tuple(ToolCall(name, arguments) for name, arguments in wanted)


@pytest.mark.parametrize(
    "text", ["", "hello", "f(x=", "f(x=1) and text", "g(1)", "[f(x=1)", "f(x=" + "[" * 99 + "]" * 99 + ")", "[]", "1", "f(x=@)"]
)  # fmt: skip
def test_what_is_no_call(text) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_calls(text, TOOLS)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8})?", fullmatch=True)
arguments = st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), plain, max_size=4)


@given(st.lists(st.tuples(names, arguments), min_size=1, max_size=3))
def test_what_python_writes_is_read(calls) -> None:
    """repr and json.dumps are not ours: a call's arguments in either spelling come back."""
    wanted = tuple(ToolCall(name, given_) for name, given_ in calls)
    for spell in (repr, json.dumps):
        text = ", ".join(f"{n}({', '.join(f'{k}={spell(v)}' for k, v in a.items())})" for n, a in calls)
        assert parse_calls(f"[{text}]") == wanted
    assert parse_calls(json.dumps([{"name": n, "arguments": a} for n, a in calls])) == wanted


@given(st.text() | st.text("f(x=\"',){}[]1 :"))
def test_anything_is_calls_or_an_error(text) -> None:
    try:
        calls = parse_calls(text)
    except ValueError:
        return
    assert calls


@given(st.from_regex(r"[a-z]{1,4}\((([a-z]{1,3}=([0-9]|'[a-z \"]*'|\[[0-9]\])), ?)*\)", fullmatch=True))
def test_calls_that_python_can_parse(text) -> None:
    """The same arguments as Python's parser finds."""
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        return
    wanted = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert parse_calls(text)[0].arguments == wanted


@pytest.mark.parametrize(
    ("written_", "text", "calls"),
    [
        ("A {s}[f(a=1)]{e} B", "A  B", ["f"]),
        ("{s}[f(a=1), g()]{e}{s}h(){e}done", "done", ["f", "g", "h"]),
        ("{s}no call{e}", "no call", []),
        ("{s}[f(a=1)]", "", ["f"]),
        ("x{e}y", "xy", []),
    ],
)
def test_an_answer_with_calls(written_, text, calls) -> None:
    """By ids: text before, between and after calls; an end token that is left out, or alone; no special token is text."""
    tokens = [*byte_alphabet(), CALL_START, CALL_END, "<|im_end|>"]
    vocabulary = Vocabulary(tokens, array("I"), False, [], [tokens[256:]], [256, 257, 258], {})
    tokenizer = Tokenizer(vocabulary)
    reply = Reply(tokenizer, [258], GenerationSettings(), 999, Report())
    said = "".join(reply.add(i) for i in [*tokenizer.encode(written_.format(s=CALL_START, e=CALL_END)), 258])
    assert (said, reply.report.text) == (text, text)
    assert [call.name for call in reply.calls] == calls and reply.report.finish_reason == "eos"


def test_a_call_that_is_cut_is_no_text_and_no_call() -> None:
    tokens = [*byte_alphabet(), CALL_START, CALL_END]
    tokenizer = Tokenizer(Vocabulary(tokens, array("I"), False, [], [tokens[256:]], [256, 257], {}))
    reply = Reply(tokenizer, [], GenerationSettings(max_new_tokens=5), 999, Report())
    for i in tokenizer.encode(f"{CALL_START}[f(a=1)]")[:5]:
        reply.add(i)
    assert (reply.report.finish_reason, reply.report.text, reply.calls) == ("length", "", [])


CALLS = (ToolCall("f", {"a": "x", "n": [1, "y"], "o": {"k": True}}), ToolCall("g", {}))


def test_past_calls_are_written_as_the_template_of_lfm25_writes_them() -> None:
    """Where a template has no place for past calls, they are written in front of the content; texts in them are texts
    as elsewhere.
    """
    chat = Conversation([Message("user", "hi"), Message("assistant", "done", tool_calls=CALLS)], TOOLS)
    for name in ("lfm2.5/chat_template.jinja", "chat_template_text_model.jinja"):
        rendered = ChatFormat((SPELLINGS / name).read_text()).render(chat, write_calls=True)
        assert f"assistant\n{written(CALLS)}done<|im_end|>" in rendered
    guarded = ChatFormat((SPELLINGS / "chat_template_text_model.jinja").read_text()).render(
        chat, text=lambda t: f"~{t}", write_calls=True
    )
    assert '<|tool_call_start|>[~f(a="~x", n=[1, \'~y\'], o={"k": true}), ~g()]<|tool_call_end|>~done' in guarded


def test_tools_without_a_place_are_refused(demo_model) -> None:
    with pytest.raises(PromptError, match="no place for tools"):
        demo_model.prompts.render(Conversation([Message("user", "hi")], TOOLS), [])
