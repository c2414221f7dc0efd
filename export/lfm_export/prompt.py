"""Tokenizer and chat template → prompt.json, checked here so that the device need not: the compiled tokenizer against
`tokenizers`, the compiled chat format against jinja2. What cannot be expressed is an error that names the part.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lfm_runtime.compile_tokenizer import compile_tokenizer
from lfm_runtime.errors import PromptError
from lfm_runtime.files import damage_is, read_json_object
from lfm_runtime.prompt import ChatFormat, Message, PromptSpec, Role, chat_template, image_tokens, token_text
from lfm_runtime.tokenizer import Tokenizer
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as ReferenceTokenizer

CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (Message("user", "Hi"),),
    (Message("user", "What is in this image?", 1),),
    (Message("user", "Compare them.", 3),),
    (Message("system", "You are terse."), Message("user", "Hi")),
    (Message("system", "You are terse."), Message("user", "Look.", 1), Message("assistant", "A cat."), Message("user", "Sure?")),
    (Message("user", " spaces \n\n and {{ braces }} <b>&amp;</b> ", 2), Message("assistant", "line\nline\n"), Message("user", "…", 1)),
    (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"), Message("user", "e")),
    (Message("user", "x"), Message("assistant", "<think>long thought</think> short"), Message("user", "y"),
     Message("assistant", "<think>again</think>z"), Message("user", "w")),
)  # fmt: skip

STRINGS: tuple[str, ...] = (
    "", " ", "\n", "\t\t \r\n", "Hello, world! It's 3.14159 o'clock; we'll SEE, they'RE here.", "12345678901234567890",
    'def f(x: int) -> str:\n    return f"{x!r}"  # comment\n\n\n', '{"a": [1, 2.5e-3, null], "b": "\\u00e9"}',
    "Grüße, señor! Ça va? Příliš žluťoučký kůň. Καλημέρα κόσμε. Привет, мир. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया.",
    "你好，世界。こんにちは世界。안녕하세요 세계. สวัสดีชาวโลก. ሰላም ልዑል. 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀀",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 ✨ e\u0301 \u200d\u200b\ufeff ½ ② Ⅷ ٣٤ 𝟙𝟚",
    "\x00\x01\x1c\x1d\x7f\x80\x85\xa0\u1680\u2028\u2029\u3000 \ufffd", "ſ'ſ K'RE 'll'VE n't", "a" * 300, "<|im_end|> <image>x",
    "   leading and trailing   ", "tab\tnew\nline\rreturn\r\nboth", "!!!???...,,,;;;---___===+++***///\\\\\\|||",
)  # fmt: skip


def compile_prompt(folder: Path) -> PromptSpec:
    """The checkpoint's tokenizer and chat template in the runtime's form, checked.

    Raises:
        PromptError: a file is missing, or a part cannot be compiled.
    """
    path = folder / "tokenizer.json"
    spec = read_json_object(path, PromptError)
    config = read_json_object(folder / "tokenizer_config.json", PromptError, required=False)
    with damage_is(PromptError, path, "copy it from the checkpoint again"):
        vocabulary = compile_tokenizer(spec, reference_ranges)
    template = chat_template(folder, config)
    if template is None:
        raise PromptError(f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)")
    named = {**read_json_object(folder / "special_tokens_map.json", PromptError, required=False), **config}
    specials = {name: text for name, value in named.items() if name.endswith("_token") and (text := token_text(value)) is not None}
    tokens = image_tokens(folder, config, {token for token in vocabulary.tokens if token})
    chat = compile_chat(template, specials)
    if chat.image != tokens.image:
        raise PromptError(f"chat template: no place for images: it writes {chat.image!r} for one, the tokenizer has {tokens.image!r}")
    try:
        reference = ReferenceTokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise PromptError(f"{path} cannot be read by the tokenizers library ({e})") from e
    reference.no_padding()
    reference.no_truncation()
    check_tokenizer(Tokenizer(vocabulary), reference, STRINGS)
    return PromptSpec(vocabulary, chat, tokens)


# --------------------------------------------------------------------------------------------------------- tokenizer


def reference_ranges() -> tuple[list[int], list[int], list[int]]:
    """Letters, numbers and spaces as the `tokenizers` library sees them, beyond ASCII: its Unicode tables, not Python's."""
    found = []
    for name in (r"\p{L}", r"\p{N}", r"\s"):
        split = pre_tokenizers.Split(Regex(name + "+"), behavior="removed", invert=True)
        flat: list[int] = []
        for start in range(128, sys.maxunicode + 1, 1 << 16):
            codes = [c for c in range(start, min(start + (1 << 16), sys.maxunicode + 1)) if not 0xD800 <= c < 0xE000]
            for _, (begin, end) in split.pre_tokenize_str("".join(map(chr, codes))):
                if flat and flat[-1] == codes[begin] - 1:
                    flat[-1] = codes[end - 1]
                else:
                    flat += (codes[begin], codes[end - 1])
        found.append(flat)
    return found[0], found[1], found[2]


def check_tokenizer(compiled: Tokenizer, reference: ReferenceTokenizer, strings: Sequence[str]) -> None:
    """Raise PromptError at the first string whose ids or decoded text differ."""
    for text in strings:
        wanted, got = reference.encode(text, add_special_tokens=False).ids, compiled.encode(text)
        if got != wanted:
            raise PromptError(f"tokenizer.json cannot be compiled: {text[:60]!r} gives ids {got[:12]} instead of {wanted[:12]}")
        if compiled.decode(wanted, skip_special=False) != reference.decode(wanted, skip_special_tokens=False):
            raise PromptError(f"tokenizer.json cannot be compiled: the ids of {text[:60]!r} decode to another text")


# ----------------------------------------------------------------------------------------------------- chat template


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; rendering ignores it, as transformers does."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_template(template: str, messages: Sequence[Message], specials: dict[str, Any], *, generation: bool = True) -> str:
    """The chat template through jinja2, set up as transformers sets it up."""

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda x, ensure_ascii=False, **kw: json.dumps(x, ensure_ascii=ensure_ascii, **kw)
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda _: fail("it asks for today's date, which a compiled prompt cannot know")
    turns = [{"role": m.role, "content": _content(m)} for m in messages]
    return environment.from_string(template).render(messages=turns, add_generation_prompt=generation, **specials)


def _content(message: Message) -> str | list[dict[str, str]]:
    if not message.images:
        return message.text
    return [{"type": "image"}] * message.images + [{"type": "text", "text": message.text}]


def compile_chat(template: str, specials: dict[str, Any]) -> ChatFormat:
    """Find what the template puts around messages by rendering marked conversations; then check the built-in set.

    Raises:
        PromptError: the template fails, or is not message by message; names the conversation or part.
    """

    def render(*messages: Message, generation: bool = False) -> str:
        try:
            return render_template(template, messages, specials, generation=generation)
        except Exception as e:  # a template can raise anything: TemplateError, TypeError, KeyError …
            raise PromptError(f"chat template: it fails on {_describe(messages)} ({e}); it cannot be compiled") from e

    def around(text: str, mark: str, part: str) -> tuple[str, str]:
        before, found, after = text.partition(mark)
        if not found:
            raise PromptError(f"chat template: {part} does not appear as it was given; the template cannot be compiled")
        return before, after

    def added(longer: str, shorter: str, part: str) -> str:
        if not longer.startswith(shorter):
            raise PromptError(f"chat template: {part} changes what stands before it; the template cannot be compiled")
        return longer[len(shorter) :]

    user, reply, again = Message("user", "⟦u⟧"), Message("assistant", "⟦a⟧"), Message("user", "⟦v⟧")
    first = render(user)
    second = render(user, reply)
    before_assistant, after_assistant = around(added(second, first, "an assistant turn"), "⟦a⟧", "an assistant turn")
    before_user, after_user = around(added(render(user, reply, again), second, "a second user turn"), "⟦v⟧", "a second user turn")
    start, _ = around(first, "⟦u⟧", "the user's text")
    if not start.endswith(before_user):
        raise PromptError("chat template: the first user turn opens differently from later ones; it cannot be compiled")
    begin = start[: len(start) - len(before_user)]
    with_image = render(Message("user", "⟦u⟧", 1))
    image = added(around(with_image, "⟦u⟧", "text after an image")[0], start, "an image")
    head, tail = around(render(Message("system", "⟦s⟧"), user), "⟦s⟧", "the system prompt")
    after_system, _ = around(tail, before_user + "⟦u⟧", "the user's turn after a system prompt")
    # Without a system message a template may put in one of its own: then `begin` is head + its text + after_system.
    default_system = ""
    if begin.startswith(head) and begin.endswith(after_system) and len(begin) > len(head):
        default_system = begin[len(head) : len(begin) - len(after_system)]
        begin = _common_prefix(head, str(specials.get("bos_token") or ""))
    before_system = added(head, begin, "the system prompt")
    chat = ChatFormat(
        begin=begin,
        before={"system": before_system, "user": before_user, "assistant": before_assistant},
        after={"system": after_system, "user": after_user, "assistant": after_assistant},
        generation=added(render(user, generation=True), first, "the generation prompt"),
        image=image,
        default_system=default_system,
        drop_empty_system=render(Message("system", ""), user) == first,
        thinking_end="</think>" if "⟦t⟧" not in render(user, Message("assistant", "⟦t⟧</think>x"), user, reply) else "",
    )
    for messages in CONVERSATIONS:
        wanted, got = render(*messages, generation=True), chat.render(messages)
        if wanted != got:
            at = len(_common_prefix(wanted, got))
            raise PromptError(
                f"chat template: {_describe(messages)} differs in compiled form: {got[at : at + 40]!r} instead of {wanted[at : at + 40]!r}"
            )
    return chat


def _common_prefix(a: str, b: str) -> str:
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _describe(messages: Sequence[Message]) -> str:
    names: dict[Role, str] = {"system": "a system prompt", "user": "a user turn", "assistant": "an assistant turn"}
    return "a conversation of " + ", ".join(
        names[m.role] + (f" with {m.images} image{'s' if m.images > 1 else ''}" if m.images else "") for m in messages
    )
