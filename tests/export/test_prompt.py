"""Chat templates as transformers renders them, without jinja2."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from lfm_export.prompt import CONVERSATIONS, NEEDED, check_chat, render_template
from lfm_runtime.errors import PromptError
from lfm_runtime.text.messages import IMAGE, Conversation, Message, ToolCall
from lfm_runtime.text.spec import ChatFormat

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo" / "checkpoint"
SPECIALS = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"}

PARTS = """{%- macro parts(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for item in content -%}{%- if item.type == "image" -%}{{- "<image>" -}}{%- else -%}{{- item.text -}}{%- endif -%}{%- endfor -%}
{%- endif -%}{%- endmacro -%}"""

TEMPLATES = {
    "one line": """{{bos_token}}{% for m in messages %}{{'<|im_start|>' + m['role'] + '
'}}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "system first, dropped when empty": PARTS
    + """
{{- bos_token -}}
{%- set ns = namespace(system_prompt="") -%}
{%- if messages[0]["role"] == "system" -%}
  {%- set ns.system_prompt = parts(messages[0]["content"]) -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if ns.system_prompt -%}{{- "<|im_start|>system\n" + ns.system_prompt + "<|im_end|>\n" -}}{%- endif -%}
{%- for m in messages -%}{{- "<|im_start|>" + m["role"] + "\n" + parts(m["content"]) + "<|im_end|>\n" -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}""",
    "thinking dropped, generation marked": PARTS
    + """
{{- bos_token -}}
{%- set keep = keep_past_thinking | default(false) -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == "assistant" -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {{- "<|im_start|>" + m.role + "\n" -}}
  {%- if m.role == "assistant" -%}
    {%- generation -%}
    {%- set content = parts(m.content) -%}
    {%- if not keep and loop.index0 != ns.last and "</think>" in content -%}
      {%- set content = content.split("</think>")[-1] | trim -%}
    {%- endif -%}
    {{- content + "<|im_end|>\n" -}}
    {%- endgeneration -%}
  {%- else -%}{{- parts(m.content) + "<|im_end|>\n" -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}""",
    "default system prompt": PARTS
    + """
{{- bos_token -}}
{%- if messages[0].role != "system" -%}{{- "<|im_start|>system\nYou are a helpful multimodal assistant.<|im_end|>\n" -}}{%- endif -%}
{%- for m in messages -%}{{- "<|im_start|>" + m.role + "\n" + parts(m.content) + "<|im_end|>\n" -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}""",
    "another shape": PARTS
    + """
{%- for m in messages -%}{{- "[" + m.role + "] " + parts(m.content) + "\n\n" -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- "[assistant] " -}}{%- endif -%}""",
}
TEMPLATES |= {
    path.relative_to(ROOT / "scripts" / "bench" / "spellings").as_posix(): path.read_text()
    for path in sorted((ROOT / "scripts" / "bench" / "spellings").rglob("*.jinja"))
}
# The releases' own files, where somebody has them: a folder with any number of *.jinja.
TEMPLATES |= (
    {str(path): path.read_text() for path in sorted(Path(os.environ["LFM_EDGE_REAL_FILES"]).rglob("*.jinja"))}
    if "LFM_EDGE_REAL_FILES" in os.environ
    else {}
)


@pytest.fixture(scope="module", params=list(TEMPLATES), ids=lambda name: name.replace(" ", "_"))
def template(request) -> str:
    return TEMPLATES[request.param]


class FixedDate(datetime):
    """A `datetime` with a fixed now(), for transformers."""

    stands = datetime(2026, 1, 1)

    @classmethod
    def now(cls, tz=None):
        return cls.stands


def by_transformers(template: str, chat: Conversation, *, generation: bool) -> str | None:
    """Return what apply_chat_template renders; None where it raises."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    clock = utils.datetime
    utils.datetime, FixedDate.stands = FixedDate, chat.now or FixedDate.stands
    # Content of several parts is a list there as well, and so are dates: nothing of ours takes part.
    messages = [message.as_dict() for message in chat.messages]
    try:
        found = utils.render_jinja_template(
            conversations=[messages],
            tools=list(chat.tools) or None,
            chat_template=template,
            add_generation_prompt=generation,
            **SPECIALS,
        )
    except Exception:
        return None
    finally:
        utils.datetime = clock
    return found[0][0]


def ours(template: str, chat: Conversation, *, generation: bool) -> str | None:
    try:
        return ChatFormat(template, SPECIALS).render(chat, generation=generation)
    except PromptError:
        return None


words = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["<think>a</think> b", "</think>", "<image>", "<|im_end|>", "{{ x }}", "'\"\\\n", " \n x \t", "é<&>", "\u2028"]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 10**12) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
messages = st.builds(
    Message,
    st.sampled_from(["system", "user", "user", "assistant", "assistant", "tool"]),
    words | st.lists(words | st.just(IMAGE), max_size=4).map(tuple),
    st.none() | words,
    st.lists(st.builds(ToolCall, words, st.dictionaries(words, json_values, max_size=3)), max_size=2).map(tuple),
)
tools = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.dictionaries(words, json_values, max_size=3)}),
    max_size=2,
)
conversations = st.builds(
    Conversation, st.lists(messages, max_size=5), tools, st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1))
)


@settings(max_examples=120)
@given(chat=conversations, generation=st.booleans())
def test_any_conversation_is_rendered_as_transformers_does(template, chat, generation) -> None:
    """Texts and images in any order, several system messages, tools, calls, results, thoughts, dates: the same text or
    an error in both.
    """
    assert ours(template, chat, generation=generation) == by_transformers(template, chat, generation=generation)


def test_the_built_in_conversations_are_rendered_as_jinja2_does(template) -> None:
    for chat in (*NEEDED, *CONVERSATIONS):
        try:
            wanted = render_template(ChatFormat(template, SPECIALS), chat)
        except Exception:
            wanted = None
        assert ours(template, chat, generation=True) == wanted


CONSTRUCTS = {
    "white space": "a {% if true %} \n b {%- if true +%} c\n{%+ endif %}  {# x #}\n  {% endif %}\n\td {{- 1 -}} e\n\n",
    "comments": "a{#- b -#} c {# {% if %} #}\nd{#\n#}\n",
    "crlf": "a\r\n{% if true %}\r\nb{% endif %}\rc\r\n",
    "loop": "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.revindex0 }}{{ loop.length }}{{ loop.previtem is defined }}"
    "{{ loop.nextitem.role if not loop.last }}{% else %}none{% endfor %}",
    "filtered loop": "{% for m in messages if m.role != 'user' %}{{ loop.index0 }}{{ m.role }}{% else %}none{% endfor %}",
    "break": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "scopes": "{% set x = 1 %}{% for i in [1, 2] %}{{ x }}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}{% if true %}{% set x = 9 %}{% endif %}{{ x }}",
    "namespace": "{% set ns = namespace(a=1, b='x') %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.c is defined }}",
    "macro": "{% macro f(a, b='d', c=a) %}[{{ a }}{{ b }}{{ c }}]{% endmacro %}{{ f(1) }}{{ f(1, c=2) }}{{ f('x', 'y', 'z') }}{{ f() }}",
    "macro sees later names": "{% macro f() %}{{ y }}{% endmacro %}{% set y = 3 %}{{ f() }}{% for y in [4] %}{{ f() }}{% endfor %}",
    "block set": "{% set x %}a{{ 1 }}b{% endset %}[{{ x }}]{% set a, b = (1, 2) %}{{ a }}{{ b }}",
    "arithmetic": "{{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 3 ** 2 }} {{ -2 ** 2 }} {{ 1 + 2 * 3 - 4 / 2 }} {{ 'a' * 3 }} {{ 1.5e3 }} {{ 10 }}",
    "comparison": "{{ 1 < 2 < 3 }}{{ 1 < 2 > 3 }}{{ 'a' in 'cat' }}{{ 'a' not in 'cat' }}{{ not 1 == 2 }}{{ 1 == 1.0 }}{{ [] == [] }}{{ x == y }}",
    "logic": "{{ 0 or 'a' }}{{ 1 and 'b' }}{{ '' or none }}{{ not '' and 1 }}{{ 'x' if false }}{{ 'x' if 0 else 'y' if 1 else 'z' }}",
    "subscripts": "{{ messages[0]['role'] }}{{ messages[-1].role }}{{ messages[99] is defined }}{{ 'abcdef'[1:4] }}{{ 'abcdef'[::-1] }}{{ 'abcdef'[:-1] }}"
    "{{ [1, [2, 3]][1][0] }}{{ (1, 2).1 }}{{ {'a': {'b': 5}}.a.b }}{{ messages[1:] | length }}",
    "strings": "{{ 'a' 'b' }}{{ \"it's\" }}{{ 'tab\\there' }}{{ 'Grüße\\n' }}{{ '\\u00e9' }}{{ 'a' ~ 1 ~ none }}{{ 'a\nb' }}",
    "methods": "{{ ' a b '.strip() }}{{ 'a,b,c'.split(',')[-1] }}{{ 'abc'.startswith('ab') }}{{ 'x'.join(['1', '2']) }}{{ {'a': 1}.get('b', 7) }}"
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'items': 3}['items'] }}{{ 'AbC'.lower().upper().title() }}",
    "filters": "{{ [1, 'a'] | tojson }}{{ {'b': 1, 'a': 'é<'} | tojson(indent=2) }}{{ '  x ' | trim }}{{ 'xxaxx' | trim('x') }}{{ [1, 2] | join('-') }}"
    "{{ nothing | default('d') }}{{ '' | default('d', true) }}{{ 'abc' | first }}{{ [1, 2] | last }}{{ none | string }}{{ 1.0 | string | length }}"
    "{{ 'aXa' | replace('a', 'b') | lower }}{{ [1, 2] | list }}{{ messages | map(attribute='role') | join }}{{ 'abc' | upper | capitalize }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'eq', 'user') | list | length }}{{ -3 | abs }}",
    "filters bind tighter": "{{ 'a' + 'B' | lower }}{{ ('a' + 'B') | lower }}{{ -1 | string }}{{ 'x' | length + 1 }}{{ 1 if 'a' | length == 1 else 2 }}",
    "tests": "{{ 1 is number }}{{ true is number }}{{ true is integer }}{{ 1.5 is float }}{{ 'a' is string }}{{ {} is mapping }}{{ [] is sequence }}{{ 'a' is iterable }}"
    "{{ none is none }}{{ x is undefined }}{{ 3 is odd }}{{ 4 is even }}{{ 9 is divisibleby 3 }}{{ 1 is not none }}{{ 1 is defined and 2 is defined }}{{ 'a' is in ['a'] }}"
    "{{ 1 is eq 1 }}{{ 2 is gt(1) }}{{ false is false }}{{ 1 is true }}{{ 1 is boolean }}",
    "undefined": "[{{ x }}]{% for i in x %}no{% endfor %}{{ x is string }}{{ x | length }}{{ 1 in x }}{% if x %}no{% endif %}",
    "undefined attribute": "{{ x.y }}",
    "undefined call": "{{ x() }}",
    "undefined sum": "{{ x + 'a' }}",
    "type error": "{{ 'a' + 1 }}",
    "no such key": "{{ messages[0].nope.deeper }}",
    "raise": "{{ raise_exception('no') }}",
    "range limit": "{{ range(1000000) | length }}",
    "unpack": "{% for a, b in [1] %}{% endfor %}",
    "set on no namespace": "{% set x = {} %}{% set x.a = 1 %}",
    "date": "{{ strftime_now('%d %B %Y') }}",
    "tuple": "{{ 1, 2 }}{{ () }}{{ (1,) }}",
    "generation": "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x is defined }}",
    "nested braces": "{{ {'a': {'b': [1, {'c': '}}'}]}}['a']['b'][1].c }}{{ '%}' }}",
    "trailing comma": "{{ [1, 2,] }}{{ {'a': 1,} }}",
    "line end": "x\n{% if true %}\ny\n{% endif %}\n",
    "else after cuts": "{% for x in [1] %}{% continue %}{% else %}E{% endfor %}{% for x in [1, 2] %}{% break %}{% else %}F{% endfor %}"
    "{% for x in [1, 2] %}{% if x == 2 %}{% break %}{% endif %}{% else %}G{% endfor %}",
    "generators": "{% if messages|selectattr('role','equalto','nobody') %}Y{% else %}N{% endif %}{% set g = messages|map(attribute='role') %}"
    "{{ g | join }}{{ g | join }}{{ g is sequence }}{{ g[0] is defined }}",
    "undefined is a sequence": "{{ nope is sequence }}{{ [nope] }}{{ nope is iterable }}",
    "macro default of the same name": "{% set f = 1 %}{% macro g(f=f) %}[{{ f }}]{% endmacro %}{{ g() }}{{ g(2) }}",
    "printed objects": "{{ namespace(a=1) }}{% macro f() %}{% endmacro %}{{ f }}{% for x in [1, 2] %}{{ loop }}{% endfor %}",
    "not iterable": "{% for x in 3 %}{% endfor %}",
    "zero": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_each_construct_is_as_in_jinja2(name) -> None:
    """Jinja's own rendering of every construct that is known here; an error in both, or the same text."""
    chat = Conversation(
        [Message("system", "s"), Message("user", "u"), Message("assistant", "a")], now=datetime(2026, 3, 4)
    )
    try:
        wanted = render_template(ChatFormat(CONSTRUCTS[name], SPECIALS), chat)
    except Exception:
        wanted = None
    assert ours(CONSTRUCTS[name], chat, generation=True) == wanted
    if wanted is not None:
        ChatFormat(CONSTRUCTS[name]).parsed  # noqa: B018


pieces = st.sampled_from(
    [
        piece
        for source in TEMPLATES.values()
        for piece in re.split(r"(?=\{[%{#])|(?<=[%}#]\})| (?=is|not|in|\||\+)", source)
        if piece
    ]
)


@settings(max_examples=400)
@given(source=st.lists(pieces, max_size=8).map("".join))
def test_templates_of_shuffled_pieces_are_errors_or_as_in_jinja2(source) -> None:
    """Whatever is not refused gives jinja2's text."""
    chat = Conversation(
        [Message("system", "s"), Message("user", ("u", IMAGE)), Message("assistant", "<think>x</think>a")]
    )
    try:
        wanted = render_template(ChatFormat(source, SPECIALS), chat)
    except Exception:
        wanted = None
    found = ours(source, chat, generation=True)
    assert found is None or found == wanted


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns=namespace(go=true) %}{% for x in [3, 1] if ns.go %}{{ x }}{% set ns.go=false %}{% endfor %}",
        "{% macro f() %}{{ varargs }}{% endmacro %}{{ f() }}",
        "{% set true = 0 %}",
        "{% for none in [1] %}{% endfor %}",
        "{{ " + "9" * 5000 + " }}",
        "{% for x in [1] %}{{ bos_token }}{% endfor %}{% set bos_token = 'x' %}",
        "{% macro f() %}{{ bos_token }}{% endmacro %}{% set bos_token = 1 %}{{ f() }}",
    ],
)
def test_what_depends_on_jinjas_compiler_is_refused(source) -> None:
    assert ours(source, Conversation([Message("user", "u")]), generation=True) is None


BAD = {
    "syntax": ("{% if %}", "line 1"),
    "not closed": ("{% for m in messages %}", "endfor or else is missing"),
    "raises": ("{{ raise_exception('no') }}", "it fails on a conversation of a user turn"),
    "unknown filter": ("{{ messages | xmlattr }}", "the filter xmlattr is not supported"),
    "unknown tag": ("{% include 'x' %}", "the tag include is not supported"),
    "unknown test": ("{% if 1 is prime %}{% endif %}", "the test prime is not supported"),
    "no place for images": ("{% for m in messages %}{{ m.content | string }}{% endfor %}", "no place for images"),
    "text of a text model": (
        TEMPLATES["chat_template_text_model.jinja"],
        "no place for images: .* use the vision-language model's",
    ),
    "changes text": (
        "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content|upper }}{% else %}<image>{{ m.content[1].text }}{% endif %}{% endfor %}",
        "does not appear as it was given",
    ),
    "counts": ("{{ messages|length }}", "does not appear as it was given"),
}


@pytest.mark.parametrize("case", BAD)
def test_templates_that_cannot_be_used_are_named(case) -> None:
    source, says = BAD[case]
    with pytest.raises(PromptError, match=says) as caught:
        check_chat(ChatFormat(source, SPECIALS), "<image>")
    assert "chat template" in str(caught.value)


@pytest.mark.parametrize("name", ["2025/chat_template.jinja", "lfm2.5/chat_template.jinja", "3b/chat_template.jinja"])
def test_the_releases_templates_are_taken(name) -> None:
    check_chat(ChatFormat(TEMPLATES[name], SPECIALS), "<image>")
