"""How far two distributions, or two feature vectors, are from each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


def kl_divergence(logits: Float, other: Float) -> Float:
    """KL(softmax(logits) ‖ softmax(other)) in nats, for each row."""
    p, q = _log_softmax(logits), _log_softmax(other)
    divergence: Float = (np.exp(p) * (p - q)).sum(1)
    return divergence


def standard_error(groups: Sequence[Float]) -> float:
    """Standard error of the mean over all values of `groups`, which are drawn whole: tokens of one answer are alike.

    That of a ratio of sums (Cochran 1977, Sampling Techniques, 6.3). NaN for one group: it cannot tell.
    """
    sums, sizes = (np.array([f(g) for g in groups], np.float64) for f in (np.sum, len))
    if len(groups) < 2:
        return float("nan")
    residuals = sums - sizes * (sums.sum() / sizes.sum())
    return float(np.sqrt(np.square(residuals).sum() * len(groups) / (len(groups) - 1)) / sizes.sum())


def _log_softmax(logits: Float) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def cosines(a: Float, b: Float) -> Float:
    """Cosine of the angle between row i of `a` and row i of `b`, for each i."""
    result: Float = (a * b).sum(1, dtype=np.float64) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)).astype(
        np.float64
    )
    return result
