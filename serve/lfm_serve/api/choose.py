"""POST /v1/choose: how likely given answers to questions about the same images are; nothing is generated.

{"images": [URL …], "question": …, "choices": [text, text …]}, or several of the last two: {"images": …, "questions":
[{"question": …, "choices": …} …]}. `system` and `model` as elsewhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lfm_runtime.answer.choice import Choice, Chosen
from lfm_runtime.images.opened import CutImage
from lfm_runtime.model import Model
from lfm_runtime.text.messages import Conversation, Message

from lfm_serve.api.answers import usage
from lfm_serve.api.chat import Picture, picture, typed
from lfm_serve.api.errors import ApiError

_MOST_ANSWERS, _MOST_QUESTIONS = 256, 64


_KNOWN = ("question", "questions", "choices", "images", "system", "model", "stream")


@dataclass(frozen=True)
class Asked:
    """A request, checked."""

    pictures: tuple[Picture, ...]
    questions: tuple[tuple[str, tuple[str, ...]], ...]
    system: str = ""
    model: str | None = None
    unused: tuple[str, ...] = field(default=(), compare=False)  # fields that change nothing here

    def prepared(self, model: Model, images: Sequence[CutImage]) -> list[Choice]:
        """What the engine scores.

        Raises:
            EdgeError: the answers are no choice, or do not fit the context.
        """
        turns = [Message("system", self.system)] if self.system else []
        found = []
        for question, answers in self.questions:
            chat = Conversation([*turns, Message.user(question, len(images))], special=False)
            found.append(model.prepare_choice(chat, images, answers))
        return found


def parse_choose(body: Any) -> Asked:
    """Raises ApiError where it is not such a request."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    if typed(body, "stream", bool):
        raise ApiError(400, "stream: all choices are answered at once; leave it out", None, "stream")
    raw = typed(body, "questions", list)
    if raw is not None and body.get("question") is not None:
        raise ApiError(400, "question and questions: send one of them", None, "questions")
    if raw == []:
        raise ApiError(400, "questions is empty; send one, or question", None, "questions")
    questions = [_question(one, f"questions[{n}]") for n, one in enumerate(raw)] if raw else [_question(body, "")]
    if len(questions) > _MOST_QUESTIONS:
        raise ApiError(400, f"{len(questions)} questions; at most {_MOST_QUESTIONS}", None, "questions")
    images = typed(body, "images", list) or []
    pictures = tuple(picture(one, f"images[{n}]") for n, one in enumerate(images))
    unused = tuple(sorted(name for name in body if name not in _KNOWN))
    for name in unused:
        if meant := difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.8):
            raise ApiError(400, f"{name} is unknown; did you mean {meant[0]}?", None, name)
    return Asked(pictures, tuple(questions), typed(body, "system", str) or "", typed(body, "model", str), unused)


def _question(raw: Any, where: str) -> tuple[str, tuple[str, ...]]:
    if not isinstance(raw, dict):
        raise ApiError(400, f"{where} is not an object", None, where)
    question, answers = typed(raw, "question", str), typed(raw, "choices", list)
    before = f"{where}." if where else ""
    if not question or not question.strip():
        raise ApiError(400, f"{before}question is missing", None, f"{before}question")
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ApiError(400, f"{before}choices is not a list of texts", None, f"{before}choices")
    if len(answers) > _MOST_ANSWERS:
        raise ApiError(
            400, f"{before}choices has {len(answers)} texts; at most {_MOST_ANSWERS}", None, f"{before}choices"
        )
    return question, tuple(answers)


def response(name: str, asked: Asked, chosen: Sequence[Chosen]) -> dict[str, Any]:
    """What a client gets: for one question its answers, for several a list of them."""
    results = [
        {"question": question, **one.as_dict()} for (question, _), one in zip(asked.questions, chosen, strict=True)
    ]
    counts = [usage(one.report) for one in chosen]
    total = {key: sum(count[key] for count in counts) for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
    images = sum(one.report.timing_ms["vision"] or 0.0 for one in chosen)
    whole = sum(one.report.timing_ms["total"] or 0.0 for one in chosen)  # the first waited for its turn
    spent = {"vision_ms": round(images, 3), "total_ms": round(whole, 3)}
    head = {"object": "choice", "model": name}
    return {**head, **(results[0] if len(results) == 1 else {"results": results}), "usage": total, "timings": spent}
