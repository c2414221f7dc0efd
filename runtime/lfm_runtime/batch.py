"""Many questions, several answers at once: one decode step reads the weights once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lfm_runtime.decode.context import Context
from lfm_runtime.decode.sampling import Generation, Sampler
from lfm_runtime.decode.states import BatchState
from lfm_runtime.engine.failures import failures_are_ours
from lfm_runtime.errors import EdgeError, SettingError
from lfm_runtime.images.pixels import ImageLike, each_image
from lfm_runtime.model import Job, Model
from lfm_runtime.report import Report
from lfm_runtime.text.messages import Message

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

_ROOM = 512


@dataclass
class _Row:
    """One of the answers that are decoded together."""

    index: int
    job: Job
    sampler: Sampler
    token: int  # sampled, not yet fed


def answer_all(
    model: Model,
    questions: Iterable[tuple[ImageLike | Sequence[ImageLike], str]],
    *,
    rows: int = 4,
    system: str = "",
    **generation: Unpack[Generation],
) -> Iterator[tuple[int, Report | EdgeError]]:
    """Answer (images, question) pairs, `rows` of them decoded together; a place that becomes free is given to the next
    at once.

    Args:
        model: with a decoder whose attention shares its past (every bundle of ours), not low_memory.
        questions: read as places become free.
        rows: answers at a time.
        system: a system prompt for all.
        **generation: as for `Model.answer`; a seed is the same for all.

    Yields:
        (position in `questions`, its report with the text), as each is finished; instead of a report the error of a
        question that could not be asked.

    Raises:
        SettingError: impossible rows, or a model that cannot.
    """
    if rows < 1:
        raise SettingError(f"rows {rows} is impossible; allowed: 1 and above")
    if model.sessions.execution.low_memory:
        raise SettingError(
            "answer_all needs encoder and decoder in memory at the same time; load the model without low_memory"
        )
    if model.sessions.execution.on_gpu:
        raise SettingError("answer_all runs only on the CPU; load the model with another profile: profile='generic'")
    model.setup.generation.with_changes(generation)  # a wrong setting is everyone's
    with failures_are_ours(model.bundle.folder):
        if not model.decoder.info.shares_kv:
            raise SettingError(
                f"{model.decoder.path} cannot decode several answers at once; export the bundle with lfm-edge, "
                "without --portable"
            )
        yield from _answer_all(model, enumerate(questions), rows, system, generation)


def _answer_all(
    model: Model,
    questions: Iterator[tuple[int, tuple[ImageLike | Sequence[ImageLike], str]]],
    rows: int,
    system: str,
    generation: Generation,
) -> Iterator[tuple[int, Report | EdgeError]]:
    state = BatchState(model.decoder, rows, _ROOM)
    places: list[_Row | None] = [None] * rows
    more = True
    while True:
        while more and None in places:
            place = places.index(None)
            if (asked := next(questions, None)) is None:
                more = False
                break
            index, (images, question) = asked
            images = each_image(images)
            try:
                messages = [*([Message("system", system)] if system else []), Message.user(question, len(images))]
                job = model.prepare_answer(messages, images, **generation)
            except EdgeError as e:
                yield index, e
                continue
            context = Context(model.decoder, model.cache)
            logits = model.read(job, context, returning=model.cache is not None)
            sampler = Sampler(job.settings, model.decoder.info.vocabulary, job.prompt.ids)
            row = _Row(index, job, sampler, sampler.next(logits))
            job.reply.add(row.token)
            if job.reply.finished:
                job.finish()
                yield index, job.reply.report
                continue
            if job.capacity > state.capacity:
                state = state.moved(rows, -(-job.capacity // _ROOM) * _ROOM)
                places = sorted(places, key=lambda p: p is None)
                place = places.index(None)
            state.put(place, context.snapshot())
            places[place] = row
        running = sum(p is not None for p in places)
        if not running:
            return
        if not more and running <= len(places) // 2:  # nobody comes any more: the rest goes on in fewer rows
            state = state.moved(running, state.capacity)
            places = [p for p in places if p is not None]
        embeds = model.decoder.embed([p.token if p else 0 for p in places])
        logits = state.step(np.ascontiguousarray(embeds[0][:, None]))
        for place, one in enumerate(places):
            if one is None:
                continue
            one.token = one.sampler.next(logits[place])
            one.job.reply.add(one.token)
            if one.job.reply.finished:
                one.job.finish()
                state.leave(place)
                places[place] = None
                yield one.index, one.job.reply.report
