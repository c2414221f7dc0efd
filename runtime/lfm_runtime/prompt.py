"""Conversation → token ids, with the places where image features go. Reads prompt.json; knows nothing about models.

The chat template is not run on the device: export reduces it to what stands before and after each message, and checks that
form against jinja2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from lfm_runtime.compile_tokenizer import compile_tokenizer, unicode_ranges
from lfm_runtime.contract import SCHEMA_VERSION
from lfm_runtime.errors import BundleError, PromptError
from lfm_runtime.files import damage_is, read_json_object
from lfm_runtime.images import ImagePlan
from lfm_runtime.tokenizer import Tokenizer, Vocabulary

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn. `images` is how many images stand before the text."""

    role: Role
    text: str
    images: int = 0


@dataclass(frozen=True)
class ChatFormat:
    """A chat template reduced to text around messages. The defaults are LFM2's ChatML."""

    begin: str = "<|startoftext|>"
    before: dict[str, str] = field(
        default_factory=lambda: {role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")}
    )
    after: dict[str, str] = field(default_factory=lambda: dict.fromkeys(("system", "user", "assistant"), "<|im_end|>\n"))
    generation: str = "<|im_start|>assistant\n"
    image: str = "<image>"
    default_system: str = ""  # put in when the conversation has no system message
    drop_empty_system: bool = False
    thinking_end: str = ""  # in assistant turns before the last, text up to and including this is dropped

    def render(self, messages: Sequence[Message], *, generation: bool = True) -> str:
        """The prompt as text, one image placeholder an image."""
        parts = [self.begin]
        if self.default_system and not (messages and messages[0].role == "system"):
            messages = [Message("system", self.default_system), *messages]
        last_assistant = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
        for i, message in enumerate(messages):
            text = message.text
            if message.role == "system" and not text and self.drop_empty_system:
                continue
            if self.thinking_end and message.role == "assistant" and i != last_assistant and self.thinking_end in text:
                text = text.rsplit(self.thinking_end, 1)[-1].strip()
            parts += [self.before[message.role], self.image * message.images, text, self.after[message.role]]
        return "".join(parts) + (self.generation if generation else "")


@dataclass(frozen=True)
class ImageTokens:
    """The special tokens around image features. None where the processor leaves them out."""

    image: str = "<image>"
    start: str | None = "<|image_start|>"
    end: str | None = "<|image_end|>"
    thumbnail: str | None = "<|img_thumbnail|>"
    tile: str | None = "<|img_row_{row}_col_{column}|>"

    def expand(self, plan: ImagePlan) -> str:
        """The text that replaces one image placeholder; one `image` token for each feature row."""
        parts = [self.start or ""]
        if plan.tiled:
            for n in range(plan.rows * plan.columns):
                row, column = divmod(n, plan.columns)
                parts.append((self.tile or "").format(row=row + 1, column=column + 1))
                parts.append(self.image * plan.views[n].tokens)
            if plan.thumbnail is not None:
                parts += [self.thumbnail or "", self.image * plan.thumbnail.tokens]
        else:
            parts.append(self.image * plan.views[0].tokens)
        return "".join(parts) + (self.end or "")


@dataclass(frozen=True)
class PromptSpec:
    """All of prompt.json."""

    vocabulary: Vocabulary
    chat: ChatFormat
    image_tokens: ImageTokens

    def save(self, path: Path) -> None:
        """Write prompt.json."""
        value = {"schema": SCHEMA_VERSION, **asdict(self)}
        path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> PromptSpec:
        """Read prompt.json.

        Raises:
            BundleError: damaged, incomplete, or of a newer schema.
        """
        raw = read_json_object(path, BundleError)
        with damage_is(BundleError, path, "export the bundle again"):
            if raw["schema"] > SCHEMA_VERSION:
                raise BundleError(f"{path} has schema {raw['schema']}, this lfm-edge reads {SCHEMA_VERSION}; update lfm-edge")
            spec = PromptSpec(
                Vocabulary(**_known(Vocabulary, raw["vocabulary"])),
                ChatFormat(**_known(ChatFormat, raw["chat"])),
                ImageTokens(**_known(ImageTokens, raw["image_tokens"])),
            )
            if not spec.chat.image:
                raise BundleError(f"{path} has no place for images in its chat format; export the bundle again")
            return spec


def _known(cls: type, raw: dict[str, Any]) -> dict[str, Any]:
    return {f.name: raw[f.name] for f in fields(cls)}


@dataclass(frozen=True)
class RenderedPrompt:
    """Token ids; `image_token` stands once for every row of image features, in order. `image_ends[i]` is where those of image i end."""

    ids: list[int]
    image_tokens: int
    image_ends: tuple[int, ...] = ()


class PromptBuilder:
    """Renders conversations with images for one model."""

    def __init__(self, spec: PromptSpec) -> None:
        self.spec = spec
        self.tokenizer = Tokenizer(spec.vocabulary)
        image = self.tokenizer.id_of.get(spec.image_tokens.image)
        if image is None:
            raise PromptError(f"the tokenizer has no {spec.image_tokens.image} token; is this a vision-language checkpoint?")
        self.image_id = image

    def render(self, messages: Sequence[Message], plans: Sequence[ImagePlan]) -> RenderedPrompt:
        """Ids of a conversation whose images, in order, have these plans.

        Raises:
            PromptError: the number of placeholders and images differ (a question that spells out the placeholder).
        """
        pieces = self.spec.chat.render(messages).split(self.spec.chat.image)
        if len(pieces) - 1 != len(plans):
            raise PromptError(
                f"the prompt has {len(pieces) - 1} places for {len(plans)} images; "
                f"leave {self.spec.chat.image} out of the text, places are made for the images given"
            )
        text = pieces[0] + "".join(
            self.spec.image_tokens.expand(plan) + piece for plan, piece in zip(plans, pieces[1:], strict=True)
        )
        ids = self.tokenizer.encode(text)
        wanted, found = sum(plan.tokens for plan in plans), ids.count(self.image_id)
        if wanted != found:
            raise PromptError(f"the prompt has {found} image tokens where the images give {wanted}; leave image tokens out of the text")
        places = [i for i, token in enumerate(ids) if token == self.image_id]
        counts = accumulate(plan.tokens for plan in plans)
        return RenderedPrompt(ids, wanted, tuple(places[count - 1] + 1 for count in counts))


# ------------------------------------------------------------------------------------- folders without a prompt.json


def compile_on_device(folder: Path) -> PromptSpec:
    """PromptSpec from tokenizer.json alone, for hub folders: LFM2's ChatML is assumed and not checked against jinja2.

    Raises:
        PromptError: no tokenizer.json, a tokenizer that cannot be compiled, or a chat template that is not ChatML.
    """
    spec = read_json_object(folder / "tokenizer.json", PromptError)
    config = read_json_object(folder / "tokenizer_config.json", PromptError, required=False)
    template = chat_template(folder, config)
    for marker in ("<|im_start|>", "<|im_end|>"):
        if template is not None and marker not in template:
            raise PromptError(f"{folder}: the chat template does not use {marker}; make a bundle with: lfm-edge export")
    with damage_is(PromptError, folder / "tokenizer.json", "copy it from the checkpoint again"):
        vocabulary = compile_tokenizer(spec, unicode_ranges)
    bos = token_text(config.get("bos_token")) or "<|startoftext|>"
    system_first = template is not None and "system_prompt" in template
    return PromptSpec(
        vocabulary,
        ChatFormat(
            begin=bos if template is None or "bos_token" in template else "",
            drop_empty_system=system_first,
            thinking_end="</think>" if template is not None and "</think>" in template else "",
        ),
        image_tokens(folder, config, {token for token in vocabulary.tokens if token}),
    )


def image_tokens(folder: Path, tokenizer_config: dict[str, Any], known: set[str]) -> ImageTokens:
    """The image tokens by the names tokenizer_config.json gives them; a token the vocabulary lacks is left out, and all but the
    image token itself where the processor's `use_image_special_tokens` is off.
    """
    default = ImageTokens()
    image = token_text(tokenizer_config.get("image_token")) or default.image
    for name in ("processor_config.json", "preprocessor_config.json", "config.json"):
        if read_json_object(folder / name, PromptError, required=False).get("use_image_special_tokens") is False:
            return ImageTokens(image, None, None, None, None)

    def pick(key: str, fallback: str | None) -> str | None:
        name = token_text(tokenizer_config.get(key)) or fallback
        return name if name in known else None

    tile = default.tile if default.tile and default.tile.format(row=1, column=2) in known else None
    return ImageTokens(
        image, pick("image_start_token", default.start), pick("image_end_token", default.end),
        pick("image_thumbnail", default.thumbnail), tile,
    )  # fmt: skip


def token_text(value: Any) -> str | None:
    """A token in a config is its text, or an object with `content`."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The Jinja source: chat_template.jinja, chat_template.json, or inside tokenizer_config.json (where "default" wins)."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = read_json_object(folder / "chat_template.json", PromptError, required=False).get("chat_template")
    found = found or tokenizer_config.get("chat_template")
    if isinstance(found, list):
        found = next((t.get("template") for t in found if t.get("name") == "default"), None)
    return found if isinstance(found, str) else None
