"""How likely given answers are after a prompt: each is fed once, nothing is generated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lfm_runtime.decode.decoder import Decoder
from lfm_runtime.decode.sampling import Top, log_softmax
from lfm_runtime.decode.state import State
from lfm_runtime.decode.states import SharedState
from lfm_runtime.formats.contract import MANY_TOKENS


def log_likelihood(
    decoder: Decoder, state: State, logits: NDArray[np.float32], answer: Sequence[int], ends: Sequence[int]
) -> float:
    """The natural logarithm of the probability that exactly these tokens follow, and then the end.

    Args:
        decoder: whose state it is.
        state: after the prompt; as before on return.
        logits: [vocabulary] after the prompt; unchanged.
        answer: token ids, at least one.
        ends: the tokens that end an answer; any of them.
    """
    mark = state.mark()
    total = float(log_softmax(logits)[answer[0]])
    try:
        at = 0
        while at < len(answer):
            rows = _after(decoder, state, answer[at : at + MANY_TOKENS - 1])
            for row in rows:
                at += 1
                known = log_softmax(row)
                total += float(known[answer[at]] if at < len(answer) else np.logaddexp.reduce(known[list(ends)]))
    finally:
        state.rewind(mark)
    return total


def _after(decoder: Decoder, state: State, tokens: Sequence[int]) -> Sequence[NDArray[np.float32]]:
    """The logits [vocabulary] after each of these tokens, fed in one step where the graph gives all of them."""
    if isinstance(state, SharedState) and decoder.verifies:
        return list(state.step_all(decoder.embed(list(tokens))))
    found = []
    for token in tokens:
        logits = state.step_token(token)
        found.append(logits.whole() if isinstance(logits, Top) else logits.copy())
    return found
