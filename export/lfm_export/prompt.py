"""Tokenizer and chat template → prompt.json, checked here so that the device need not: the compiled tokenizer against
`tokenizers`, the chat template's rendering against jinja2. What cannot be expressed is an error that names the part.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lfm_runtime.errors import PromptError
from lfm_runtime.formats.files import damage_is, read_json_object
from lfm_runtime.text.compile_tokenizer import compile_tokenizer
from lfm_runtime.text.messages import IMAGE, Conversation, Message, ToolCall
from lfm_runtime.text.spec import ChatFormat, PromptSpec, chat_format, chat_template, image_tokens, template_place
from lfm_runtime.text.tokenizer import Tokenizer
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as ReferenceTokenizer

_TOOL = json.loads("""
{"type": "function", "function": {"name": "get_time", "description": "The time, \\"exactly\\" – <b>&.",
 "parameters": {"type": "object", "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]},
 "n": {"type": "integer"}}, "required": ["zone"]}}}""")
_CALLS = (ToolCall("get_time", {"zone": "UTC", "n": 2, "deep": {"a": [1.5, None, True]}}), ToolCall("other", {}))


def _alone(*conversations: tuple[Message, ...]) -> tuple[Conversation, ...]:
    return tuple(map(Conversation, conversations))


NEEDED = _alone((Message("user", "Hi"),), (Message.user("What is in this image?", 1),))
"""A template that fails on one of these is of no use."""

CONVERSATIONS: tuple[Conversation, ...] = (
    *_alone(
        (Message.user("Compare them.", 3),),
        (Message("user", ("First", IMAGE, "then", IMAGE, IMAGE, "", "last.")),),
        (Message("user", (IMAGE,)),),
        (Message("user", ""), Message("assistant", ("text in parts", " and more")), Message("user", ("only text",))),
        (Message("system", "You are terse."), Message("user", "Hi")),
        (Message("system", ""), Message("user", "Hi")),
        (
            Message("system", ("You are", " terse.")),
            Message("system", "Really."),
            Message("user", "Hi"),
            Message("system", "In French."),
        ),
        (
            Message("system", "You are terse."),
            Message.user("Look.", 1),
            Message("assistant", "A cat."),
            Message("user", "Sure?"),
        ),
        (
            Message.user(" spaces \n\n and {{ braces }} <b>&amp;</b> ", 2),
            Message("assistant", "line\nline\n"),
            Message.user("…", 1),
        ),
        (
            Message("user", "a"),
            Message("user", "b"),
            Message("assistant", "c"),
            Message("assistant", "d"),
            Message("user", "e"),
        ),
        (
            Message("user", "x"),
            Message("assistant", "<think>long thought</think> short"),
            Message("user", "y"),
            Message("assistant", "<think>again</think>z"),
            Message("user", "w"),
        ),
        (
            Message("user", "x"),
            Message("assistant", "short", "long thought"),
            Message("user", "y"),
            Message("assistant", "z", ""),
        ),
        (
            Message("user", "x"),
            Message("assistant", "", tool_calls=_CALLS),
            Message("tool", '{"time": "12:00"}'),
            Message("assistant", "Noon."),
        ),
        (),
    ),
    Conversation((Message("user", "Time?"),), (_TOOL, _TOOL), datetime(2026, 2, 3)),  # noqa: DTZ001  (a date, without a place)
    Conversation(
        (
            Message("system", "Be terse."),
            Message.user("Time?", 1),
            Message("assistant", "Wait.", tool_calls=_CALLS),
            Message("tool", "12:00"),
            Message("tool", ("13:00", IMAGE)),
        ),
        (_TOOL,),
        datetime(2026, 12, 31),  # noqa: DTZ001  (as strftime_now has it: the machine's own time)
    ),
)
"""Conversations on which a template is compared with jinja2: the same text, or an error in both."""

STRINGS: tuple[str, ...] = (
    "",
    " ",
    "\n",
    "\t\t \r\n",
    "Hello, world! It's 3.14159 o'clock; we'll SEE, they'RE here.",
    "12345678901234567890",
    'def f(x: int) -> str:\n    return f"{x!r}"  # comment\n\n\n',
    '{"a": [1, 2.5e-3, null], "b": "\\u00e9"}',
    "Grüße, señor! Ça va? Příliš žluťoučký kůň. Καλημέρα κόσμε. Привет, мир. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया.",
    "你好，世界。こんにちは世界。안녕하세요 세계. สวัสดีชาวโลก. ሰላም ልዑል. 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀀",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 ✨ e\u0301 \u200d\u200b\ufeff ½ ② Ⅷ ٣٤ 𝟙𝟚",
    "\x00\x01\x1c\x1d\x7f\x80\x85\xa0\u1680\u2028\u2029\u3000 \ufffd",
    "ſ'ſ K'RE 'll'VE n't",
    "a" * 300,
    "<|im_end|> <image>x",
    "   leading and trailing   ",
    "tab\tnew\nline\rreturn\r\nboth",
    "!!!???...,,,;;;---___===+++***///\\\\\\|||",
)


def compile_prompt(folder: Path) -> PromptSpec:
    """The checkpoint's tokenizer and chat template in the runtime's form, checked.

    Raises:
        PromptError: a file is missing, or a part cannot be compiled.
    """
    path = folder / "tokenizer.json"
    spec = read_json_object(path, PromptError, advice="copy it from the checkpoint's own model")
    config = read_json_object(folder / "tokenizer_config.json", PromptError, required=False)
    with damage_is(PromptError, path, "copy it from the checkpoint again"):
        vocabulary = compile_tokenizer(spec, reference_ranges)
    if chat_template(folder, config) is None:
        raise PromptError(
            f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            "copy it from the model's repository"
        )
    chat = chat_format(folder, config)
    tokens = image_tokens(folder, config, {token for token in vocabulary.tokens if token})
    try:
        check_chat(chat, tokens.image)
    except PromptError as e:
        raise PromptError(f"{template_place(folder)}: {e}") from e
    try:
        reference = ReferenceTokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise PromptError(f"{path} cannot be read by the tokenizers library ({e})") from e
    reference.no_padding()
    reference.no_truncation()
    check_tokenizer(Tokenizer(vocabulary), reference, STRINGS)
    return PromptSpec(vocabulary, chat, tokens)


# --------------------------------------------------------------------------------------------------------- tokenizer


def reference_ranges(names: Sequence[str]) -> dict[str, list[int]]:
    """Members of Unicode classes beyond ASCII, as the `tokenizers` library sees them: its tables, not Python's."""
    return {name: list(_members(name)) for name in names}


@functools.cache
def _members(name: str) -> tuple[int, ...]:
    split = pre_tokenizers.Split(
        Regex((r"\s" if name == "s" else rf"\p{{{name}}}") + "+"), behavior="removed", invert=True
    )
    flat: list[int] = []
    for start in range(128, sys.maxunicode + 1, 1 << 16):
        codes = [c for c in range(start, min(start + (1 << 16), sys.maxunicode + 1)) if not 0xD800 <= c < 0xE000]
        for _, (begin, end) in split.pre_tokenize_str("".join(map(chr, codes))):
            if flat and flat[-1] == codes[begin] - 1:
                flat[-1] = codes[end - 1]
            else:
                flat += (codes[begin], codes[end - 1])
    return tuple(flat)


def check_tokenizer(compiled: Tokenizer, reference: ReferenceTokenizer, strings: Sequence[str]) -> None:
    """Raise PromptError at the first string whose ids or decoded text differ."""
    for text in strings:
        wanted, got = reference.encode(text, add_special_tokens=False).ids, compiled.encode(text)
        if got != wanted:
            raise PromptError(
                f"tokenizer.json cannot be compiled: {text[:60]!r} gives ids {got[:12]} instead of {wanted[:12]}"
            )
        if compiled.decode(wanted, skip_special=False) != reference.decode(wanted, skip_special_tokens=False):
            raise PromptError(f"tokenizer.json cannot be compiled: the ids of {text[:60]!r} decode to another text")


# ----------------------------------------------------------------------------------------------------- chat template


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; a block with names of its own, as transformers has it."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


@functools.lru_cache(maxsize=4)
def _by_jinja2(template: str) -> jinja2.Template:
    """A template set up as transformers sets it up (4.57 and 5: utils/chat_template_utils.py)."""

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda x, ensure_ascii=False, **kw: json.dumps(x, ensure_ascii=ensure_ascii, **kw)
    environment.globals["raise_exception"] = fail
    return environment.from_string(template)


def render_template(chat: ChatFormat, conversation: Conversation, *, generation: bool = True) -> str:
    """A conversation through jinja2. A template that fails can raise anything."""
    return _by_jinja2(chat.template).render(
        messages=[message.as_dict() for message in conversation.messages],
        tools=list(conversation.tools) or None,
        documents=None,
        add_generation_prompt=generation,
        strftime_now=(conversation.now or datetime.now()).strftime,  # noqa: DTZ005  (local, as there)
        **chat.specials,
    )


def check_chat(chat: ChatFormat, image: str) -> None:
    """Compare a template with jinja2 on NEEDED and CONVERSATIONS.

    Raises:
        PromptError: it cannot be parsed here, fails on what every model is asked, has no place for an image, or differs
            from jinja2.
    """
    chat.parsed  # noqa: B018  (says what it does not know)
    for conversation in (*NEEDED, *CONVERSATIONS):
        wanted, failure = "", ""
        try:
            wanted = render_template(chat, conversation)
        except Exception as e:  # noqa: BLE001  (a template can raise anything: TemplateError, TypeError, KeyError …)
            failure = f"chat template: it fails on {_describe(conversation)} ({e})"
        try:
            got = chat.render(conversation)
        except PromptError as e:
            if not failure:
                raise PromptError(f"{e}; jinja2 renders {_describe(conversation)}") from e
            got = failure
        if conversation in NEEDED:
            if failure:
                raise PromptError(f"{failure}; it cannot be used")
            places, wanted_places = wanted.count(image), sum(message.images for message in conversation.messages)
            if places != wanted_places:
                raise PromptError(
                    f"chat template: no place for images: for {_describe(conversation)} it writes {image} "
                    f"{places} times instead of {wanted_places}; it is a text model's template; use the "
                    "vision-language model's"
                )
            if not all(text in wanted for message in conversation.messages for text in message.texts):
                raise PromptError(
                    f"chat template: {_describe(conversation)} does not appear as it was given; it cannot be used"
                )
        elif got != (failure or wanted):
            at = next(
                (i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got))
            )
            raise PromptError(
                f"chat template: {_describe(conversation)} differs from jinja2: {got[at : at + 40]!r} instead of "
                f"{wanted[at : at + 40]!r}"
            )


def _describe(conversation: Conversation) -> str:
    names = {
        "system": "a system prompt",
        "user": "a user turn",
        "assistant": "an assistant turn",
        "tool": "a tool's result",
    }
    turns = [
        names[m.role] + (f" with {m.images} image{'s' if m.images > 1 else ''}" if m.images else "")
        for m in conversation.messages
    ]
    return f"a conversation of {', '.join(turns) or 'no turns'}" + (" with tools" if conversation.tools else "")
