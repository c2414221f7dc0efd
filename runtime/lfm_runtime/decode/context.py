"""What the decoder has processed, and how to get there again without doing the work again.

A prompt is known by its *keys*: token ids, and for image tokens a number made from the picture and its plan, so that
two prompts with different images differ. Three ways back to a known prefix, the longest wins: the state as it is, a
mark inside it, a snapshot from the cache. Recurrent convolutions cannot be cut to any length as attention can; hence
marks and snapshots, which hold them, at every point worth returning to.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lfm_runtime.decode.cache import Cache
from lfm_runtime.decode.sampling import Top
from lfm_runtime.decode.state import Embeds, Mark, Snapshot, Starter, State
from lfm_runtime.decode.states import SharedState
from lfm_runtime.report import run_through

MOST_AT_ONCE = 320
"""Tokens of a step: a tiled image's 2,800 in one would take 440 MiB to work on, in parts of this size 50, in the same
time. One view and a question are below it.
"""

Keys = NDArray[np.int64]
FEWEST_KEPT = 128
"""Tokens of text that are worth a step and a copy of their own: what stands before a message is kept where it has so
many more than what is kept already. A system prompt with its tools is; the turns of a small talk are not, each.
"""
_ROOM = 512
"""Capacity grows in such steps: a conversation does not move its past at every turn."""


@dataclass(frozen=True)
class Known:
    """How much of a prompt need not be computed, and the snapshot that knows it where the context itself does not."""

    length: int
    cached: Snapshot | None = None


class Context:
    """The tokens a decoder has processed, and its state after them."""

    def __init__(self, decoder: Starter, cache: Cache | None = None) -> None:
        self.keys: Keys = np.empty(0, np.int64)
        self._decoder = decoder
        self._cache = cache
        self._state: State | None = None
        self._marks: list[Mark] = []
        self._speculated = 0  # tokens of the last feed_all

    @property
    def length(self) -> int:
        """Number of tokens processed so far."""
        return len(self.keys)

    def find(self, keys: Keys) -> Known:
        """The longest known prefix of `keys`, short of their last: its logits are wanted."""
        if self._state is None:  # a step failed or was interrupted: what it had processed is lost
            self.keys, self._marks = self.keys[:0], []
        common = _common(self.keys, keys[:-1])
        here = [common] if common == self.length else [m.length for m in self._marks if m.length <= common]
        length = max(here, default=0)
        cached = self._cache.longest(keys[:-1], longer_than=length) if self._cache else None
        return Known(cached.length, cached) if cached else Known(length)

    def resume(self, known: Known, keys: Keys, capacity: int) -> None:
        """Be where a prefix of `keys` that `find` found ends, with room for `capacity` tokens."""
        state, self._state = self._state, None
        roomy = -(-capacity // _ROOM) * _ROOM
        capacity = max(capacity, min(roomy, self._decoder.longest or roomy))
        if known.cached or known.length == 0 or state is None:
            state = self._decoder.start(capacity, known.cached)
            self._marks = [state.mark()]
        else:
            if known.length < self.length:
                state.rewind(next(m for m in self._marks if m.length == known.length))
            self._marks = [m for m in self._marks if m.length <= known.length]
            if state.capacity < capacity:
                state = self._decoder.start(capacity, state.snapshot())
        self._state, self.keys = state, keys[: known.length]

    def feed(self, embeds: Embeds, keys: Keys) -> NDArray[np.float32]:
        """Take in tokens [1, S, H]; returns the logits [vocabulary] after the last, valid until the next call."""
        return run_through(self.feeding(embeds, keys))

    def feeding(self, embeds: Embeds, keys: Keys) -> Generator[None, None, NDArray[np.float32]]:
        """As `feed`, but a step of at most MOST_AT_ONCE tokens each time."""
        assert self._state is not None
        state, self._state = self._state, None  # a step that fails, or is the last that anyone asks for, leaves none
        parts = np.array_split(embeds, -(-len(keys) // MOST_AT_ONCE), axis=1)
        for n, part in enumerate(parts):
            if n:
                yield
            logits = state.step(part)
        self.keys = np.concatenate([self.keys, keys])
        self._state = state
        return logits

    def feed_token(self, token: int) -> NDArray[np.float32] | Top:
        """As `feed`, for a token of text; where the logits lie on a device, only the top of them."""
        assert self._state is not None
        state, self._state = self._state, None
        logits = state.step_token(token)
        self.keys = np.append(self.keys, token)
        self._state = state
        return logits

    def feed_all(self, embeds: Embeds, keys: Keys) -> NDArray[np.float32]:
        """As `feed`, but logits [S, vocabulary] after every token; speculative tokens can then be taken back by
        `keep`.
        """
        state, self._state = self._state, None
        assert isinstance(state, SharedState)
        logits = state.step_all(embeds)
        self.keys = np.concatenate([self.keys, keys])
        self._state = state
        self._speculated = len(keys)
        return logits

    def keep(self, tokens: int) -> None:
        """Of the last `feed_all`, the first `tokens` were right: forget the others."""
        assert isinstance(self._state, SharedState)
        self._state.keep(tokens)
        self.keys = self.keys[: self.length - self._speculated + tokens]
        self._speculated = tokens

    def remember(self, *, cached: bool = False) -> None:
        """Make this point one to return to; `cached`, also for other contexts."""
        assert self._state is not None
        self._marks.append(self._state.mark())
        if cached and self._cache:
            self._cache.keep(self.keys, self._state.snapshot())

    def snapshot(self) -> Snapshot:
        """Return a copy of the state after the tokens processed so far."""
        return self.state.snapshot().copy()

    @property
    def state(self) -> State:
        """The state after the tokens processed so far."""
        assert self._state is not None
        return self._state

    def fork(self) -> Context:
        """Another context at the same point; the two go on apart."""
        other = Context(self._decoder, self._cache)
        if self._state:
            other.keys, other._marks = self.keys, list(self._marks)
            other._state = self._decoder.start(self._state.capacity, self._state.snapshot())
        return other


def prompt_keys(ids: Sequence[int], image_id: int, views: Sequence[int], ends: Sequence[int]) -> Keys:
    """Ids with the image tokens replaced: those before `ends[i]` by `views[i]`."""
    keys = np.array(ids, np.int64)
    at = np.flatnonzero(keys == image_id)
    keys[at] = np.array(views, np.int64)[np.searchsorted(ends, at, side="right")] if len(at) else at
    return keys


def stops(views: Sequence[int], images: Sequence[int], turns: Sequence[int], end: int) -> Iterator[int]:
    """Where the steps of a prompt end that others may begin like: where each image does, between its views so that a
    step has as many of them as it may, and where a message begins, FEWEST_KEPT tokens or more after the last.

    Two prompts that are alike up to a stop of both have the same steps up to there. So what is computed is the same bit
    for bit, whatever comes after it and wherever it was gone on from.

    Args:
        views: positions where those of the prompt end.
        images: the same of its images.
        turns: where its messages begin.
        end: where the prompt ends.
    """
    last, ends = 0, sorted({*views, *turns, end})
    for here, following in pairwise(ends):
        whole = here in images or (here in turns and here - last >= FEWEST_KEPT)
        if whole or (here in views and following - last > MOST_AT_ONCE):
            yield here
            last = here
    yield end


def _common(a: Keys, b: Keys) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
