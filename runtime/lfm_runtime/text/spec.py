"""What prompts are made with: chat template, image tokens, tokenizer; from prompt.json, or from the hub's own files."""

from __future__ import annotations

import base64
import json
import re
import sys
from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lfm_runtime.errors import BundleError, PromptError
from lfm_runtime.formats.files import damage_is, read_json_object
from lfm_runtime.formats.typed import read_as
from lfm_runtime.images.layout import ImageLayout
from lfm_runtime.text.chat_template import Template
from lfm_runtime.text.compile_tokenizer import compile_tokenizer, unicode_ranges
from lfm_runtime.text.messages import Conversation, mapped_strings
from lfm_runtime.text.tokenizer import Vocabulary
from lfm_runtime.text.tool_calls import written

CHATML = (
    "{{- bos_token -}}{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{{- '<image>' if part.type == 'image' else part.text -}}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- "
    "endif -%}"
)
"""LFM2's first template, for folders that have none."""
TURN = "<|im_start|>"
"""The special token that every message of the family begins with."""
_STAND_INS_1 = {ord(old): new for old, new in zip("ª²\xa0§", "\ue001\ue002\ue003\ue000", strict=True)}


_AGAIN = "export the bundle again"
PROMPT_SCHEMA = 2
"""Of prompt.json. 1 had the chat template as text around messages; it is read too, with the template of the bundle's
own files.
"""


@dataclass(frozen=True)
class ChatFormat:
    """A chat template in Jinja's language, and the special tokens it may name."""

    template: str = CHATML
    specials: Mapping[str, str] = field(default_factory=lambda: {"bos_token": "<|startoftext|>"})

    @cached_property
    def parsed(self) -> Template:
        """The parsed template; raises PromptError where it has something unknown."""
        return Template(self.template)

    @property
    def takes_tools(self) -> bool:
        """Whether the template has a place for tools."""
        return re.search(r"\btools\b", self.template) is not None

    def render(
        self,
        chat: Conversation,
        *,
        generation: bool = True,
        text: Callable[[str], str] = str,
        write_calls: bool = False,
    ) -> str:
        """The prompt as text, one image placeholder an image; `text` is applied to every string of the conversation.
        `write_calls`: where the template has no place for calls of past turns, and transformers would lose them, they
        are written into the content.
        """
        calls = partial(written, text=text) if write_calls and "tool_calls" not in self.template else None
        return self.parsed.render(
            messages=[message.as_dict(text, calls) for message in chat.messages],
            tools=mapped_strings(list(chat.tools), text) or None,
            documents=None,
            add_generation_prompt=generation,
            now=chat.now,
            **self.specials,
        )


@dataclass(frozen=True)
class ImageTokens:
    """The special tokens around image features. None where the processor leaves them out."""

    image: str = "<image>"
    start: str | None = "<|image_start|>"
    end: str | None = "<|image_end|>"
    thumbnail: str | None = "<|img_thumbnail|>"
    tile: str | None = "<|img_row_{row}_col_{column}|>"

    def expand(self, layout: ImageLayout) -> str:
        """The text that replaces one image placeholder; one `image` token for each feature row."""
        parts = [self.start or ""]
        if layout.tiled:
            for n in range(layout.rows * layout.columns):
                row, column = divmod(n, layout.columns)
                parts.append((self.tile or "").format(row=row + 1, column=column + 1))
                parts.append(self.image * layout.views[n].tokens)
            if layout.thumbnail is not None:
                parts += [self.thumbnail or "", self.image * layout.thumbnail.tokens]
        else:
            parts.append(self.image * layout.views[0].tokens)
        return "".join(parts) + (self.end or "")


@dataclass(frozen=True)
class PromptSpec:
    """Contents of prompt.json: tokenizer, chat template, image tokens."""

    vocabulary: Vocabulary
    chat: ChatFormat
    image_tokens: ImageTokens

    def save(self, path: Path) -> None:
        """Write prompt.json. Tokens are one string and merges one array, since 200,000 numbers and strings take 50 ms
        to read.

        Raises:
            BundleError: a text is none that UTF-8 can write.
        """
        vocabulary: dict[str, Any] = {f.name: getattr(self.vocabulary, f.name) for f in fields(Vocabulary)}
        odd = {
            i: token
            for i, token in enumerate(self.vocabulary.tokens)
            if token is not None and (not token or "\n" in token)
        }
        vocabulary["tokens"] = "\n".join(
            "" if i in odd else token or "" for i, token in enumerate(self.vocabulary.tokens)
        )
        vocabulary["odd_tokens"] = odd
        vocabulary["merges"] = base64.b64encode(_little_endian(self.vocabulary.merges).tobytes()).decode()
        chat = {"template": self.chat.template, "specials": dict(self.chat.specials)}
        value = {
            "schema": PROMPT_SCHEMA,
            "vocabulary": vocabulary,
            "chat": chat,
            "image_tokens": asdict(self.image_tokens),
        }
        try:
            path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
        except UnicodeEncodeError as e:
            near = e.object[max(0, e.start - 40) : e.end]
            raise BundleError(f"tokenizer or chat template have half a surrogate pair: …{near!r}") from e

    @staticmethod
    def load(path: Path) -> PromptSpec:
        """Read prompt.json.

        Raises:
            BundleError: damaged, incomplete, or of a newer schema.
        """
        raw = read_json_object(path, BundleError)
        with damage_is(BundleError, path, _AGAIN):
            if raw["schema"] > PROMPT_SCHEMA:
                raise BundleError(
                    f"{path} has schema {raw['schema']}, this lfm-edge reads {PROMPT_SCHEMA}; update lfm-edge"
                )
            vocabulary = raw["vocabulary"]
            if raw["schema"] == 1:
                config = read_json_object(path.with_name("tokenizer_config.json"), BundleError, required=False)
                chat = chat_format(path.parent, config)
                vocabulary["merges"] = array("I", vocabulary["merges"])
                vocabulary["classes"] = {
                    "L": vocabulary["letters"],
                    "N": vocabulary["numbers"],
                    "s": vocabulary["spaces"],
                }
                vocabulary["splits"] = [split.translate(_STAND_INS_1) for split in vocabulary["splits"]]
            else:
                chat = read_as(ChatFormat, raw["chat"], path, BundleError, _AGAIN)
                tokens: list[str | None] = [token or None for token in vocabulary["tokens"].split("\n")]
                for i, token in vocabulary["odd_tokens"].items():
                    tokens[int(i)] = token
                merges = array("I", base64.b64decode(vocabulary["merges"]))
                vocabulary.update(tokens=tokens, merges=_little_endian(merges))
            small = read_as(_Small, vocabulary, path, BundleError, _AGAIN)
            return PromptSpec(
                Vocabulary(
                    tokens=vocabulary["tokens"],
                    merges=vocabulary["merges"],
                    ignore_merges=small.ignore_merges,
                    splits=list(small.splits),
                    added=[list(contents) for contents in small.added],
                    special=list(small.special),
                    classes={name: list(flat) for name, flat in small.classes.items()},
                ),
                chat,
                read_as(ImageTokens, raw["image_tokens"], path, BundleError, _AGAIN),
            )


@dataclass(frozen=True)
class _Small:
    """What of a vocabulary is stored as it is."""

    ignore_merges: bool
    splits: tuple[str, ...]
    added: tuple[tuple[str, ...], ...]
    special: tuple[int, ...]
    classes: Mapping[str, tuple[int, ...]]


def _little_endian(values: array[int]) -> array[int]:
    """Of this machine's, or back: the same, or with its bytes swapped."""
    values = values[:]
    if sys.byteorder == "big":
        values.byteswap()
    return values


# ------------------------------------------------------------------------------------- folders without a prompt.json


def compile_on_device(folder: Path) -> PromptSpec:
    """PromptSpec from a hub folder's own files; the template is run as it is and not compared with jinja2.

    Raises:
        PromptError: no tokenizer.json, or a tokenizer or template that cannot be run here.
    """
    spec = read_json_object(folder / "tokenizer.json", PromptError, advice="copy it from the checkpoint")
    config = read_json_object(folder / "tokenizer_config.json", PromptError, required=False)
    with damage_is(PromptError, folder / "tokenizer.json", "copy it from the checkpoint again"):
        vocabulary = compile_tokenizer(spec, unicode_ranges)
    chat = chat_format(folder, config)
    try:
        chat.parsed  # noqa: B018  (what it cannot run is said now)
    except PromptError as e:
        raise PromptError(f"{template_place(folder)}: {e}") from e
    return PromptSpec(vocabulary, chat, image_tokens(folder, config, {token for token in vocabulary.tokens if token}))


def chat_format(folder: Path, tokenizer_config: dict[str, Any]) -> ChatFormat:
    """The template and special tokens of a checkpoint's files; LFM2's where there is no template.

    Raises:
        PromptError: a damaged file, or the one that defines the start token is missing.
    """
    named = {**read_json_object(folder / "special_tokens_map.json", PromptError, required=False), **tokenizer_config}
    specials = {
        name: text
        for name, value in named.items()
        if name.endswith("_token") and (text := token_text(value)) is not None
    }
    extra = tokenizer_config.get("extra_special_tokens")
    if isinstance(extra, dict):
        specials.update({name: text for name, value in extra.items() if (text := token_text(value)) is not None})
    template = chat_template(folder, tokenizer_config)
    if template and "bos_token" in template and "bos_token" not in specials and not tokenizer_config:
        raise PromptError(
            f"{folder} has no tokenizer_config.json, which defines the bos_token that the chat template begins with; "
            "copy it from the model's repository"
        )
    return (
        ChatFormat(template, specials)
        if template is not None
        else ChatFormat(CHATML, {"bos_token": "<|startoftext|>", **specials})
    )


def image_tokens(folder: Path, tokenizer_config: dict[str, Any], known: set[str]) -> ImageTokens:
    """The image tokens by the names tokenizer_config.json gives them: in extra_special_tokens, else at its top, else in
    model_specific_special_tokens. One that is named "" or that the vocabulary lacks is left out, and all but the image
    token itself where the processor's `use_image_special_tokens` is off.
    """
    default = ImageTokens()
    places = [
        tokenizer_config.get("extra_special_tokens"),
        tokenizer_config,
        tokenizer_config.get("model_specific_special_tokens"),
    ]

    def name(key: str, fallback: str | None) -> str | None:
        found = (token_text(place.get(key)) for place in places if isinstance(place, dict))
        return next((text for text in found if text is not None), fallback)

    def pick(key: str, fallback: str | None) -> str | None:
        return found if (found := name(key, fallback)) in known else None

    image = name("image_token", default.image) or default.image
    for file in ("processor_config.json", "preprocessor_config.json", "config.json"):
        if read_json_object(folder / file, PromptError, required=False).get("use_image_special_tokens") is False:
            return ImageTokens(image, None, None, None, None)
    tile = default.tile if default.tile and default.tile.format(row=1, column=2) in known else None
    return ImageTokens(
        image,
        pick("image_start_token", default.start),
        pick("image_end_token", default.end),
        pick("image_thumbnail_token", default.thumbnail),
        tile,
    )


def token_text(value: Any) -> str | None:
    """A token in a config is its text, or an object with `content`."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def template_place(folder: Path) -> Path:
    """The file that `chat_template` takes the template from."""
    names = ("chat_template.jinja", "chat_template.json")
    return next((folder / name for name in names if (folder / name).exists()), folder / "tokenizer_config.json")


def chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The Jinja source: chat_template.jinja, chat_template.json, or inside tokenizer_config.json (where "default"
    wins).
    """
    if (folder / "chat_template.jinja").exists():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise PromptError(
                f"{folder / 'chat_template.jinja'} cannot be read ({e}); copy it from the checkpoint again"
            ) from e
    found = read_json_object(folder / "chat_template.json", PromptError, required=False).get("chat_template")
    found = found or tokenizer_config.get("chat_template")
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None
