"""Speculative decoding without a draft model: what followed the last tokens when they stood together before, in the
prompt or the answer, is fed beside them and checked (prompt lookup: Saxena 2023, "Prompt Lookup Decoding").

Copying is common: a question about a text, a list, a name said before. A speculative token costs no model; several are
checked in one decoder step, which reads the weights once.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from lfm_runtime.decode.context import Context
from lfm_runtime.decode.decoder import Decoder
from lfm_runtime.decode.sampling import Sampler
from lfm_runtime.report import Report

_LENGTHS = (4, 3, 2)  # of the tail that must have occurred before, the longest first


def speculative_tokens(
    decoder: Decoder,
    context: Context,
    sampler: Sampler,
    lookup: PromptLookup,
    token: int,
    capacity: int,
    report: Report,
) -> Generator[int]:
    """One token after the other, from `token` on, for as long as anyone asks. Every token is drawn from its own
    distribution: speculation changes the time and nothing else.

    Args:
        decoder: one that `verifies`.
        context: after the prompt.
        sampler: of this answer.
        lookup: knows the prompt.
        token: the first of the answer.
        capacity: tokens that the context holds at most.
        report: counts what was speculated and what was right.
    """
    while True:
        yield token
        lookup.add(token)
        more = lookup.propose()[: max(0, capacity - context.length - 1)]
        if not more:
            token = sampler.next(context.feed_token(token))
            continue
        step = [token, *more]
        logits = context.feed_all(decoder.embed(step), np.array(step))
        report.speculative_tokens += len(more)
        right = 0
        try:
            token = sampler.next(logits[0])
            while right < len(more) and token == more[right]:
                right += 1
                report.accepted_tokens += 1
                lookup.add(token)
                yield token
                token = sampler.next(logits[right])
        finally:
            context.keep(1 + right)
        lookup.learn(right, len(more))


class PromptLookup:
    """Remembers what followed each run of tokens."""

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        """`most`: tokens proposed at a time."""
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # run of tokens → where what followed it last begins
        self._most = self._now = most
        for token in prompt:
            self.add(token)

    def add(self, token: int) -> None:
        """Add one token of the prompt or of the answer."""
        for length in _LENGTHS:
            if len(self._tokens) >= length:
                self._after[tuple(self._tokens[-length:])] = len(self._tokens)
        self._tokens.append(token)

    def propose(self) -> list[int]:
        """What may come next: what came after the last tokens when they stood together before."""
        for length in _LENGTHS:
            at = self._after.get(tuple(self._tokens[-length:]))
            if at is not None:
                return self._tokens[at : at + self._now]
        return []

    def learn(self, right: int, of: int) -> None:
        """How a proposal went: twice as many next time, or as many as were accepted. A text that is not copied soon
        costs little.
        """
        self._now = min(self._most, 2 * self._now) if right == of else max(1, right)
