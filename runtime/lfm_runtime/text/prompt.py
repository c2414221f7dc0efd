"""Conversation → token ids, with the places where image features go. Knows nothing about models.

The chat template is the checkpoint's own, run by `chat_template/`; export compares it with jinja2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lfm_runtime.errors import PromptError
from lfm_runtime.images.layout import ImageLayout
from lfm_runtime.text.messages import Conversation, Message, mapped_strings
from lfm_runtime.text.spec import TURN, PromptSpec
from lfm_runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class RenderedPrompt:
    """Token ids; `image_token` stands once for every row of image features, in order. `image_ends[i]` is where those of
    image i end, `view_ends[j]` those of view j of all images, `turns[k]` where message k begins.
    """

    ids: list[int]
    image_tokens: int
    image_ends: tuple[int, ...] = ()
    view_ends: tuple[int, ...] = ()
    turns: tuple[int, ...] = ()


class PromptBuilder:
    """Renders conversations with images for one model."""

    def __init__(self, spec: PromptSpec) -> None:
        self.spec = spec
        self.tokenizer = Tokenizer(spec.vocabulary)
        image = self.tokenizer.id_of.get(spec.image_tokens.image)
        if image is None:
            raise PromptError(
                f"the tokenizer has no {spec.image_tokens.image} token; is this a vision-language checkpoint?"
            )
        if self.tokenizer.encode(spec.image_tokens.image) != [image]:
            raise PromptError(
                f"the tokenizer reads {spec.image_tokens.image} as text, since it is not among its added tokens; copy "
                "tokenizer.json from the model's repository"
            )
        if not spec.chat.template.strip():
            raise PromptError("the chat template is empty; copy it from the model's repository")
        of = spec.image_tokens
        for token in filter(None, (of.start, of.end, of.thumbnail, of.tile and of.tile.format(row=1, column=2))):
            if token not in self.tokenizer.id_of:
                raise PromptError(f"the tokenizer has no {token} token, with which images are written; export it again")
        self.image_id = image

    def _guarded(self, chat: Conversation, plain: str, guard: str) -> str:
        """A prompt in which no special token is of the conversation's texts.

        The guard stands behind every character of every text; or, where the template looks into texts (to drop
        thoughts), only inside what is a special token or may become one. Both must be the plain prompt with guards and
        nothing else, or have the same special tokens.

        Raises:
            PromptError: the template changes texts in a way that guards do not pass.
        """
        everywhere = self._text(chat, lambda text: "".join(c + guard for c in text))
        if everywhere.replace(guard, "") == plain:
            return everywhere
        found = self._text(chat, lambda text: self.tokenizer.guarded(text, guard))
        if found.replace(guard, "") == plain and self._specials(found, guard) == self._specials(everywhere, guard):
            return found
        raise PromptError(
            "the chat template changes the texts, so special tokens in them cannot be told from the template's "
            "own; run without --no-special (special=True)"
        )

    def _text(self, chat: Conversation, change: Callable[[str], str] = str) -> str:
        return self.spec.chat.render(chat, text=change, write_calls=True)

    def _specials(self, text: str, guard: str) -> list[int]:
        return [i for i in self.tokenizer.encode(text, guard=guard) if i in self.tokenizer.special]

    def render(self, chat: Conversation | Sequence[Message], layouts: Sequence[ImageLayout]) -> RenderedPrompt:
        """Ids of a conversation (messages alone are one) whose images, in order, have these layouts.

        Raises:
            PromptError: the template fails on it, has no place for its tools, or changes texts so that special=False
                cannot hold; the number of placeholders and images differ (a question that spells out the placeholder).
        """
        chat = chat if isinstance(chat, Conversation) else Conversation(chat)
        if not chat.messages:
            raise PromptError("the conversation has no message; give at least one of the user's")
        if chat.tools and not self.spec.chat.takes_tools:
            raise PromptError("the model's chat template has no place for tools; leave them out, or take another model")
        text = self._text(chat)
        guard = ""
        if not chat.special:
            guard = _unused_character(chat, text)
            text = self._guarded(chat, text, guard)
        pieces = text.split(self.spec.image_tokens.image)
        places = sum(message.images for message in chat.messages)
        if places != len(layouts):
            raise PromptError(
                f"the messages have {places} places for images (IMAGE), and {len(layouts)} images are given; give one "
                "for each"
            )
        if len(pieces) - 1 != len(layouts):
            raise PromptError(
                f"the prompt has {len(pieces) - 1} places for {len(layouts)} images; do not write "
                f"{self.spec.image_tokens.image} in the text: it is added for each image"
            )
        text = pieces[0] + "".join(
            self.spec.image_tokens.expand(layout) + piece for layout, piece in zip(layouts, pieces[1:], strict=True)
        )
        ids = self.tokenizer.encode(text, guard=guard)
        wanted, found = sum(layout.tokens for layout in layouts), ids.count(self.image_id)
        if wanted != found:
            raise PromptError(
                f"the prompt has {found} image tokens where the images give {wanted}; leave image tokens out of "
                "the text"
            )
        at = [i for i, token in enumerate(ids) if token == self.image_id]

        def ends(counts: Iterable[int]) -> tuple[int, ...]:
            return tuple(at[count - 1] + 1 for count in accumulate(counts))

        views = (view.tokens for layout in layouts for view in layout.views)
        turn = self.tokenizer.id_of.get(TURN)
        turns = tuple(i for i, token in enumerate(ids) if token == turn)
        return RenderedPrompt(ids, wanted, ends(layout.tokens for layout in layouts), ends(views), turns)


def _unused_character(chat: Conversation, rendered: str) -> str:
    """A character that stands nowhere in a conversation: a Braille pattern, which neither `repr` escapes nor any filter
    changes.
    """
    used = set(rendered)

    def note(text: str) -> str:
        used.update(text)
        return text

    for message in chat.messages:
        message.as_dict(note)
    mapped_strings(list(chat.tools), note)
    free = next((chr(code) for code in range(0x28FF, 0x27FF, -1) if chr(code) not in used), None)
    if free is None:
        raise PromptError("the text has all 256 Braille patterns; leave one out")
    return free


# ------------------------------------------------------------------------------------- folders without a prompt.json
