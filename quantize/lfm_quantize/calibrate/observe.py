"""What passes through a block's matrix products on the calibration data, sample by sample in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lfm_quantize.calibrate.blocks import Block, FedGraph, Values
from lfm_quantize.graph import linears

Float = NDArray[np.float32]
KINDS = ("image", "text")
ROWS = 384
"""Input rows kept of each matrix product and kind of token, to try a precision on."""
ROWS_AT_ONCE = 2048
"""Rows that one product of second moments is of: a product of fewer takes as long to be added up as to be computed."""


@dataclass
class Observed:
    """The inputs of one matrix product. Image and text tokens apart: a prompt is mostly image tokens, an answer is
    text.
    """

    k: int
    with_moments: bool
    largest: Float = field(init=False)  # [k]
    moments: dict[str, Float] = field(init=False, default_factory=dict)  # kind → sum of xᵀx [k, k]
    counts: dict[str, int] = field(init=False, default_factory=lambda: dict.fromkeys(KINDS, 0))
    rows: dict[str, list[Float]] = field(init=False, default_factory=lambda: {kind: [] for kind in KINDS})
    waiting: dict[str, list[Float]] = field(init=False, default_factory=lambda: {kind: [] for kind in KINDS})

    def __post_init__(self) -> None:
        """Start with nothing seen."""
        self.largest = np.zeros(self.k, np.float32)

    def add(self, x: Float, is_image: NDArray[np.bool_], rows: int, rng: np.random.Generator) -> None:
        """Add inputs x [tokens, k]; up to `rows` of them are kept of each kind."""
        np.maximum(self.largest, np.abs(x).max(0), out=self.largest)
        for kind, chosen in zip(KINDS, (is_image, ~is_image), strict=True):
            part = x[chosen]
            if not len(part):
                continue
            self.rows[kind].append(part[rng.permutation(len(part))[:rows]].copy())
            if self.with_moments:
                self.waiting[kind].append(part)
                if sum(map(len, self.waiting[kind])) >= ROWS_AT_ONCE:
                    self._measure(kind)

    def _measure(self, kind: str) -> None:
        """Add the rows that wait to the second moments."""
        if not self.waiting[kind]:
            return
        x = np.concatenate(self.waiting[kind])
        self.waiting[kind].clear()
        self.counts[kind] += len(x)
        product = x.T @ x
        if kind in self.moments:
            self.moments[kind] += product
        else:
            self.moments[kind] = product

    def summed(self) -> Observed:
        """The same, with no rows that wait to be added up."""
        for kind in KINDS:
            self._measure(kind)
        return self

    def merge(self, other: Observed) -> None:
        """Add what the same product was fed in other samples; takes its sums over."""
        np.maximum(self.largest, other.largest, out=self.largest)
        for kind in KINDS:
            self.rows[kind] += other.rows[kind]
            self.counts[kind] += other.counts[kind]
            if kind in other.moments:
                moments = other.moments.pop(kind)
                self.moments[kind] = self.moments[kind] + moments if kind in self.moments else moments

    def kept(self) -> Float:
        """The rows kept, both kinds."""
        return np.concatenate([r for kind in KINDS for r in self.rows[kind]])

    def take_moment(self, factors: Float) -> Float:
        """Mean of xᵀx [k, k] for inputs divided by `factors` [k]; each kind of token that occurs counts the same. Gives
        the sums away: they are large.
        """
        parts = [(self.moments.pop(kind), self.counts[kind]) for kind in list(self.moments)]
        for moments, count in parts:
            np.divide(moments, (factors * np.float32(count * len(parts)))[:, None], out=moments)
            np.divide(moments, factors, out=moments)
        total = parts.pop()[0]
        while parts:
            total += parts.pop()[0]
        return total


def observe(fed: FedGraph, block: Block, states: list[Values], with_moments: Mapping[str, bool]) -> dict[str, Observed]:
    """What the products named in `with_moments` are fed, with second moments where it says so. Empty without samples.

    Args:
        fed: the graph and its inputs.
        block: the block that the products are in.
        states: each sample's hidden state before the block.
        with_moments: by product name.
    """
    if not fed.feeds or not with_moments:
        return {}
    products = linears(fed.model)
    seen = {name: Observed(products[name].k, moments) for name, moments in with_moments.items()}
    inputs = {name: products[name].input for name in seen}
    rows = -(-ROWS // (fed.of or len(fed.feeds)))

    def note(i: int, values: Values) -> None:
        kinds = fed.kinds[i]
        # What is kept of a sample does not depend on which others are beside it.
        rng = np.random.default_rng(fed.numbers[i] if fed.numbers else (i, 0))
        for name, observed in seen.items():
            x = values[inputs[name]].reshape(-1, observed.k)
            kind = kinds if len(x) == len(kinds) else np.full(len(x), kinds.all())
            observed.add(x, kind, rows, rng)

    fed.run(block, states, [x for x in inputs.values() if x not in block.cut], note)
    return {name: observed.summed() for name, observed in seen.items()}
