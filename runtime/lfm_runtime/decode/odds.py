"""How likely the model takes tokens to be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_OTHERS = 20


@dataclass(frozen=True)
class Odds:
    """A generated token, and the likeliest at its place, which may be others: natural logarithms of the probabilities
    that the model gives them, before settings and grammars change them.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()  # (id, its logarithm), falling


def odds_of(logprobs: NDArray[np.float64], token: int, count: int) -> Odds:
    """Of a token and the `count` likeliest, from `log_softmax` [vocabulary]."""
    top = np.argpartition(logprobs, -count)[-count:] if count else np.empty(0, np.int64)
    falling = sorted(((int(i), float(logprobs[i])) for i in top), key=lambda one: (-one[1], one[0]))
    return Odds(token, float(logprobs[token]), tuple(falling))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logits [vocabulary] as logarithms of probabilities."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
