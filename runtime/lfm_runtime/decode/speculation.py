"""Guessing the next tokens from what stands in the prompt and the answer so far (prompt lookup: Saxena 2023, "Prompt
Lookup Decoding").

Copying is common: a question about a text, a list, a name said before. A guess costs no model; several are checked in
one decoder step, which reads the weights once.
"""

from __future__ import annotations

from collections.abc import Sequence

_LENGTHS = (4, 3, 2)  # of the tail that must have occurred before, the longest first


class PromptLookup:
    """Remembers what followed each run of tokens."""

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        """`most`: guesses at a time."""
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # run of tokens → where what followed it last begins
        self._most = self._now = most
        for token in prompt:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token, of the prompt or said."""
        for length in _LENGTHS:
            if len(self._tokens) >= length:
                self._after[tuple(self._tokens[-length:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self) -> list[int]:
        """What may come next: what came after the last tokens when they stood together before."""
        for length in _LENGTHS:
            at = self._after.get(tuple(self._tokens[-length:]))
            if at is not None:
                return self._tokens[at : at + self._now]
        return []

    def learn(self, right: int, of: int) -> None:
        """How a guess went: twice as many next time, or as many as were right. A text that is not copied soon costs
        little.
        """
        self._now = min(self._most, 2 * self._now) if right == of else max(1, right)
