"""One block quantized: observe what its products are fed, move outliers into the weights, round; try its attention."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lfm_quantize.calibrate.blocks import Block, FedGraph, Values
from lfm_quantize.calibrate.smooth import Fit, find_fit, fold, sources
from lfm_quantize.calibrate.trail import Trail
from lfm_quantize.graph import Array, QuantizeError, linears, release
from lfm_quantize.passes.attention import IntegerAttention
from lfm_quantize.passes.constants import Constants
from lfm_quantize.passes.integers import Integers, Product
from lfm_quantize.recipe import Recipe
from lfm_quantize.rounding import METHODS, Precision, Rounded, output_error

Float = NDArray[np.float32]
ATTENTION_VIEWS = 4
"""Views that attention is tried on."""
ATTENTION_ERROR = 0.05
"""Where its output has a larger relative error in 8 bits, attention stays fp32. SageAttention (arXiv:2410.02367) takes
8 bits for both products where the cosine is 0.998 or more, an error of 0.063.
"""


@dataclass
class Change:
    """What becomes of blocks: how their products are computed, and constants that are others now."""

    products: dict[str, Product] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)  # a record for each product, for the manifest
    attentions: list[dict[str, Any]] = field(default_factory=list)  # name, bits and error of each, for the manifest

    def add(self, other: Change) -> None:
        """Take in the changes of another block."""
        self.products |= other.products
        self.constants |= other.constants
        self.layers += other.layers
        self.attentions += other.attentions

    def release(self) -> None:
        """Give back the memory of arrays that were read from their files."""
        codes = [product.rounded.codes for product in self.products.values()]
        release(*codes, *self.constants.values())

    def passes(self, *, tied: bool) -> tuple[ir.passes.InPlacePass, ...]:
        """What makes the change in a graph; `tied` as for `Integers`."""
        attentions = [found["name"] for found in self.attentions if found["bits"] == 8]
        return Constants(self.constants), IntegerAttention(attentions), Integers(self.products, tied=tied)


def quantize_block(model: ir.Model, block: Block, trail: Trail, recipe: Recipe, table: Rounded | None = None) -> Change:
    """Decide a block's integers from what its products are fed in the samples (none: from the weights alone).

    Args:
        model: the whole graph, fp32.
        block: the part to quantize.
        trail: the samples before the block.
        recipe: precision by product name.
        table: the embedding table, rounded already, where the head is tied to it.

    Raises:
        QuantizeError: a weight is not finite.
    """
    products = {name: linear for name, linear in linears(model).items() if name in block.linears}
    wanted = {name: recipe.precision(name) for name in products}
    weights = {name: linear.weights() for name, linear in products.items()}
    for name, weight in weights.items():
        if not np.isfinite(weight).all():
            raise QuantizeError(f"{name} has NaN or infinite weights; the checkpoint is broken: export a sound one")

    small = {n: p for n, p in wanted.items() if p.bits < 32 and n != "head"}
    seen = trail.observe(block, {name: precision.method != "rtn" for name, precision in small.items()})

    where = sources(model)
    fits = {name: find_fit(weights[name], seen[name], where.get(name), wanted[name]) for name in seen}
    folded = fold(model, {name: fit.factors for name, fit in fits.items() if fit.smooths})

    change = Change(constants={**folded.vectors})
    for name, linear in products.items():
        weight = folded.weights.get(name, weights[name])
        if wanted[name].bits == 32:
            if name in folded.weights:
                change.constants[str(linear.weight.name)] = linear.stored(weight)
            continue
        fit = fits.get(name)
        moments = seen[name].take_moment(fit.factors) if fit and seen[name].with_moments else None
        if name == "head" and table is not None:
            rounded = table
        else:
            rounded = METHODS[wanted[name].method](weight, wanted[name], moments)
        change.products[name] = Product(rounded, fit.negative if fit else 1.0)
        change.layers.append(_record(name, wanted[name], rounded, weight, moments, fit))
    for name in block.attentions:
        if not recipe.attends_in_integers(name):
            continue
        if (tried := trail.tried(_attention_error, block, name)) is not None:
            error = float(f"{tried:.4g}")
            change.attentions.append({"name": name, "bits": 8 if error <= ATTENTION_ERROR else 32, "error": error})
    return change


def _attention_error(fed: FedGraph, states: list[Values], block: Block, name: str) -> float:
    """|y - x| / |x| of what attention gives for the first views, in 8 bits against fp32."""
    few = replace(fed, feeds=fed.feeds[:ATTENTION_VIEWS], kinds=fed.kinds[:ATTENTION_VIEWS])
    whole = replace(block, outputs=(name,))
    exact = few.run(whole, states[:ATTENTION_VIEWS])
    tried = few.rewritten(IntegerAttention([name])).run(whole, states[:ATTENTION_VIEWS])
    x, y = (np.concatenate([values[name].ravel() for values in found]) for found in (exact, tried))
    return float(np.linalg.norm(y - x) / max(float(np.linalg.norm(x)), 1e-20))


def _record(
    name: str, precision: Precision, rounded: Rounded, weight: Float, moments: Float | None, fit: Fit | None
) -> dict[str, Any]:
    error = None if moments is None else float(f"{output_error(weight, rounded.weight(), moments):.4g}")
    return {
        "name": name,
        "bits": precision.bits,
        "block": precision.block,
        "method": rounded.precision.method,
        "smoothed": fit is not None and fit.smooths,
        "bits_per_weight": round(precision.bits_per_weight, 3),
        "weights": int(weight.size),
        "weight_error": error,
    }
