"""A conversation that remembers: each question costs its own tokens, not those of all before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from lfm_runtime.answer.reply import Answer, Opened
from lfm_runtime.decode.context import Context
from lfm_runtime.decode.sampling import Generation
from lfm_runtime.engine.vision import Progress
from lfm_runtime.errors import SettingError
from lfm_runtime.images.pixels import MAX_MEGAPIXELS, ImageLike
from lfm_runtime.model import Model
from lfm_runtime.text.messages import Message

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


class Chat:
    """Questions and answers about images, in turns. `fork` gives a second conversation with the same past.

    chat = Chat(model)
    print(chat.ask("What is this?", ["photo.jpg"]).text())
    print(chat.ask("What colour is it?").text())
    """

    def __init__(self, model: Model, *, system: str = "") -> None:
        self.model = model
        self.messages: list[Message] = [Message("system", system)] if system else []
        self._images: list[Opened] = []
        self._context = Context(model.decoder, model.cache)
        self._answering = False

    @property
    def tokens(self) -> int:
        """What was read and said so far, image tokens included."""
        return self._context.length

    def ask(
        self,
        question: str,
        images: ImageLike | Opened | Sequence[ImageLike | Opened] = (),
        *,
        max_megapixels: float = MAX_MEGAPIXELS,
        progress: Progress | None = None,
        **generation: Unpack[Generation],
    ) -> Answer:
        """The next turn, about new images and all before; parameters as for `Model.answer`. What was said of an answer
        that is closed early or interrupted is part of the conversation; a turn that fails, or is interrupted before it
        says anything, is not.

        Raises:
            SettingError: the answer before is not finished.
            ImageError, PromptError: the conversation is as before.
        """
        if self._answering:
            raise SettingError("the previous answer is not finished; read it to its end, or close its iterator")
        new = [image.cut() for image in self.model.open_all(images, max_megapixels=max_megapixels)]
        turn = Message.user(question, len(new))
        answer = self.model.converse(
            [*self.messages, turn], [*self._images, *new], context=self._context, progress=progress, **generation
        )
        return Answer(self._keep(turn, new, answer), answer.reply)

    def fork(self) -> Chat:
        """Another conversation with this one's past; the two go on apart.

        Raises:
            SettingError: an answer is being made.
        """
        if self._answering:
            raise SettingError("an answer is still being generated; fork before or after it")
        other = Chat(self.model)
        other.messages, other._images = list(self.messages), list(self._images)
        other._context = self._context.fork()
        return other

    def _keep(self, turn: Message, images: Sequence[Opened], answer: Answer) -> Iterator[str]:
        self._answering = True
        try:
            with suppress(GeneratorExit):
                yield from answer
            self._add(turn, images, answer)
        except KeyboardInterrupt:
            if answer.report.text:
                self._add(turn, images, answer)
            raise
        finally:
            self._answering = False

    def _add(self, turn: Message, images: Sequence[Opened], answer: Answer) -> None:
        self.messages += [turn, Message("assistant", answer.report.text, tool_calls=tuple(answer.calls))]
        self._images += images
