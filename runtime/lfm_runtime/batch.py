"""Many questions, several answers at once: one decode step reads the weights once for all of them.

Answers join and leave between steps. While one is being read, a view of its images or a step of its prompt at a time,
the others go on: each of its steps comes after one of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from lfm_runtime.answer.choice import Choice, Chosen
from lfm_runtime.answer.reply import Job
from lfm_runtime.decode.batch_state import BatchState, Row
from lfm_runtime.decode.context import Context
from lfm_runtime.decode.sampling import Generation, Sampler
from lfm_runtime.decode.states import SharedState
from lfm_runtime.engine.failures import failures_are_ours
from lfm_runtime.errors import EdgeError, SettingError, pair
from lfm_runtime.images.pixels import ImageLike, each_image
from lfm_runtime.model import Model
from lfm_runtime.report import Report
from lfm_runtime.text.messages import Message

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

_ROOM = 512
_ALONE = 4
"""More forced tokens than these are fed in a step of their own, which costs as much as one token of all answers."""


@dataclass(eq=False)
class Seat:
    """An answer in a batch. `piece`: the text that the last step added; `error`: why it ended, where it failed."""

    job: Job
    sampler: Sampler
    piece: str = ""
    error: Exception | None = None
    tokens: list[int] = field(default_factory=list)  # not yet fed: what was sampled, then what its grammar forces

    @property
    def finished(self) -> bool:
        """Whether the answer is over."""
        return self.error is not None or self.job.reply.finished

    def take(self, logits: NDArray[np.float32]) -> None:
        """Sample the next token, and take those that follow from it."""
        reply = self.job.reply
        self.tokens = [self.sampler.next(logits)]
        self.piece = reply.add(self.tokens[0], self.sampler.odds.popleft() if self.sampler.odds else None)
        if reply.finished:
            self.job.finish()
            return
        for token in self.sampler.forced():
            self.tokens.append(token)
            self.piece += reply.add(token)
            if reply.finished:
                self.job.finish()
                return


@dataclass(eq=False)
class Scoring:
    """Questions with given answers, in a batch: over once their prompts are processed and the answers scored."""

    asked: Sequence[Choice]
    chosen: list[Chosen] | None = None
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        """Whether all are scored, or it failed."""
        return self.error is not None or self.chosen is not None

    def take(self, chosen: list[Chosen]) -> None:
        """Keep what came of it."""
        self.chosen = chosen


@dataclass
class _Reading:
    """The answer whose prompt is being processed."""

    seat: Seat | Scoring
    row: int
    context: Context
    steps: Generator[None, None, Any]


class Batch:
    """At most `rows` answers at once, each with room for `capacity` tokens; nothing large is allocated for one more."""

    def __init__(self, model: Model, rows: int, capacity: int) -> None:
        """Raises SettingError for impossible rows, or a model that cannot."""
        check(model, rows)
        self.model, self.rows = model, rows
        self._state = BatchState(model.decoder, rows, capacity)
        self._running: list[Seat] = []  # as the rows of the state
        self._reading: _Reading | None = None

    @property
    def capacity(self) -> int:
        """Tokens of prompt and answer together that each answer has room for."""
        return self._state.capacity

    @property
    def has_seat(self) -> bool:
        """Whether `add` may be called: a row is free, and no other prompt is being processed."""
        return self._reading is None and len(self._running) < self.rows

    @property
    def running(self) -> int:
        """Number of answers that are being decoded."""
        return len(self._running)

    def add(self, job: Job) -> Seat:
        """Begin an answer, where there is a seat; its prompt is processed by the steps that follow."""
        assert job.capacity <= self.capacity
        seat = Seat(job, Sampler(job.settings, self.model.decoder.info.vocabulary, job.prompt.ids, job.guide))
        context = self._context()
        steps = self.model.reading(job, context, returning=self.model.cache is not None)
        self._reading = _Reading(seat, len(self._running), context, steps)
        return seat

    def score(self, asked: Sequence[Choice]) -> Scoring:
        """Begin to score given answers, where there is a seat."""
        assert all(one.job.capacity <= self.capacity for one in asked)
        scoring, context = Scoring(asked), self._context()
        self._reading = _Reading(scoring, len(self._running), context, self.model.choosing(asked, context))
        return scoring

    def _context(self) -> Context:
        """Of a prompt that is processed in the row after those of the running answers."""
        assert self.has_seat
        return Context(Row(self._state, len(self._running)), self.model.cache)

    def grow(self, capacity: int) -> None:
        """Give each answer room for more tokens; only while no prompt is being processed."""
        assert self._reading is None
        self._state = self._state.moved(-(-capacity // _ROOM) * _ROOM)

    def drop(self, seat: Seat | Scoring) -> None:
        """End an answer that nobody wants any more; its row is free at once."""
        if self._reading and self._reading.seat is seat:
            self._reading.steps.close()
            self._reading = None
        elif isinstance(seat, Seat) and seat in self._running:
            self._leave(seat)

    def step(self) -> list[Seat | Scoring]:
        """A token of every running answer, then a view or a step of tokens of the prompt being processed. Returns the
        answers that have gone on or ended, each once; what fails ends those that it concerns.
        """
        moved = self._decode() if self._running else []
        return [*moved, *self._read()]

    def _read(self) -> list[Seat | Scoring]:
        """Go on with the prompt being processed; returns its answer where that has its first token, or failed."""
        one = self._reading
        if one is None:
            return []
        try:
            with self.model.setup.memory_is_told(), self.model.sessions.failures_are_ours():
                found = _one_step(one.steps)
                if found is None:
                    return []
                one.seat.take(found)
        except Exception as e:  # noqa: BLE001  (it ends this answer; the others go on)
            one.seat.error = e
        self._reading = None
        if isinstance(one.seat, Seat) and not one.seat.finished:
            state = one.context.state
            assert isinstance(state, SharedState)
            self._state.join(one.row, state)
            self._running.append(one.seat)
        return [one.seat]

    def _decode(self) -> list[Seat]:
        """One token more of every running answer."""
        moved = list(self._running)
        for row, seat in enumerate(moved):
            if len(seat.tokens) > _ALONE:
                self._catch_up(row, seat)
        try:
            with self.model.setup.memory_is_told(), self.model.sessions.failures_are_ours():
                embeds = self.model.decoder.embed([seat.tokens.pop(0) for seat in moved])
                logits = self._state.step(np.ascontiguousarray(embeds[0][:, None]))
        except Exception as e:  # noqa: BLE001  (a step is of all of them; the server goes on)
            for seat in moved:
                seat.error = e
        else:
            for seat, row_logits in zip(moved, logits, strict=True):
                seat.piece = ""
                try:
                    if not (seat.tokens or seat.error):
                        seat.take(row_logits)
                except Exception as e:  # noqa: BLE001  (each answer has its own logits)
                    seat.error = e
        for seat in moved:
            if seat.finished:
                self._leave(seat)
        return moved

    def _catch_up(self, row: int, seat: Seat) -> None:
        """Feed all tokens but the last that a grammar has forced in one step."""
        try:
            with self.model.setup.memory_is_told(), self.model.sessions.failures_are_ours():
                self._state.step_row(row, self.model.decoder.embed(seat.tokens[:-1]))
        except Exception as e:  # noqa: BLE001  (it ends this answer; the others go on)
            seat.error = e
        del seat.tokens[:-1]

    def _leave(self, seat: Seat) -> None:
        row = self._running.index(seat)
        self._state.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()


def _one_step(steps: Generator[None, None, Any]) -> Any:
    """Go one step on; returns what the last step gave, None before."""
    try:
        next(steps)
    except StopIteration as end:
        return end.value
    return None


def check(model: Model, rows: int) -> None:
    """Raise SettingError for impossible rows, or a model that cannot decode several answers at once."""
    if rows < 1:
        raise SettingError(f"rows {rows} is impossible; allowed: 1 and above")
    if model.sessions.execution.low_memory:
        raise SettingError(
            "several answers at once need encoder and decoder in memory at the same time; load the model without "
            "low_memory"
        )
    if model.sessions.execution.on_gpu:
        raise SettingError(
            "several answers at once are made on the CPU alone; load the model with another profile: profile='generic'"
        )
    with failures_are_ours(model.bundle.folder):
        if not model.decoder.info.shares_kv:
            raise SettingError(
                f"{model.decoder.path} cannot decode several answers at once; export the bundle with lfm-edge, "
                "without --portable"
            )


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
    check(model, rows)
    model.setup.generation.with_changes(generation)  # a wrong setting is everyone's
    yield from _answer_all(Batch(model, rows, _ROOM), enumerate(questions), system, generation)


def _answer_all(
    batch: Batch,
    questions: Iterator[tuple[int, tuple[ImageLike | Sequence[ImageLike], str]]],
    system: str,
    generation: Generation,
) -> Iterator[tuple[int, Report | EdgeError]]:
    turns = [Message("system", system)] if system else []

    def take(_: bool) -> tuple[int, Job | EdgeError] | None:
        if (asked := next(questions, None)) is None:
            return None
        images, question = pair(asked[1], "images, question")
        index, images = asked[0], each_image(images)
        try:
            return index, batch.model.prepare_answer(
                [*turns, Message.user(question, len(images))], images, **generation
            )
        except EdgeError as e:
            return index, e

    for index, found in finished(batch, take):
        if isinstance(found, EdgeError):
            yield index, found
        elif found.error:
            raise found.error
        elif isinstance(found, Seat):
            yield index, found.job.reply.report


Work: TypeAlias = "Job | Sequence[Choice]"
T = TypeVar("T")
E = TypeVar("E", bound=Exception)


def finished(batch: Batch, take: Callable[[bool], tuple[T, Work | E] | None]) -> Iterator[tuple[T, Seat | Scoring | E]]:
    """Do work as places become free, and yield it with its name when it is finished.

    Args:
        batch: grown where work needs more room.
        take: gives the next work with a name for it, or an error instead of it, which is passed on. None: called with
            True, which waits, that there is no more; with False that there is none yet.
    """
    places: list[tuple[T, Seat | Scoring]] = []
    while True:
        while batch.has_seat and (taken := take(not places)) is not None:
            name, work = taken
            if isinstance(work, Exception):
                yield name, work
                continue
            needed = work.capacity if isinstance(work, Job) else max(one.job.capacity for one in work)
            if needed > batch.capacity:
                batch.grow(needed)
            places.append((name, batch.add(work) if isinstance(work, Job) else batch.score(work)))
        if not places:
            return
        batch.step()
        for place in [place for place in places if place[1].finished]:
            places.remove(place)
            yield place
