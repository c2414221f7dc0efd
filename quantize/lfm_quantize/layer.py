"""One block quantized: observe its products' inputs, move outliers into the weights, round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from lfm_quantize.calibrate.blocks import Block, Feeds, Values, run_block
from lfm_quantize.calibrate.observe import ROWS, Observed
from lfm_quantize.graph import Graph, QuantizeError, Tensor
from lfm_quantize.passes.rewrite import quantized_nodes
from lfm_quantize.passes.smooth import find_fit, folded, sources
from lfm_quantize.recipe import Recipe
from lfm_quantize.rounding import METHODS, Rounded, output_error

Float = NDArray[np.float32]


@dataclass
class Change:
    """What becomes of a block: nodes that replace others, and constants that are new."""

    nodes: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)  # a record for each product

    def add(self, other: Change) -> None:
        """Take in the changes of another block."""
        self.nodes |= other.nodes
        self.tensors |= other.tensors
        self.layers += other.layers


def quantize_block(
    graph: Graph,
    block: Block,
    feeds: Sequence[Feeds],
    states: Sequence[Values],
    kinds: Sequence[NDArray[np.bool_]],
    recipe: Recipe,
    threads: int,
    head: tuple[bool, Rounded | None] | None,
) -> Change:
    """Decide a block's integers from what its products are fed in the samples (none: from the weights alone).

    Args:
        graph: the whole graph, fp32.
        block: the part to quantize.
        feeds: graph inputs of each sample.
        states: each sample's hidden state before the block.
        kinds: for each sample, which of its tokens are image tokens.
        recipe: precision by product name.
        threads: of onnxruntime.
        head: (tied to the embedding table, the table rounded already); None for graphs without a head.
    """
    linears = {name: linear for name, linear in graph.linears().items() if name in block.linears}
    wanted = {name: recipe.precision(name) for name in linears}
    weights = {name: graph.weight(linear) for name, linear in linears.items()}
    for name, weight in weights.items():
        if not np.isfinite(weight).all():
            raise QuantizeError(f"{name} has NaN or infinite weights; the checkpoint is broken: export a sound one")
    small = [n for n in linears if wanted[n].bits < 32 and n != "head"]
    seen = observe(graph, block, feeds, states, kinds, {n: wanted[n].method != "rtn" for n in small}, threads)

    where = {name: source for name, source in sources(graph).items() if name in seen}
    fits = {name: find_fit(weights[name], seen[name], where.get(name), wanted[name]) for name in seen}
    factors = {name: fit.factors for name, fit in fits.items() if (fit.factors != 1).any()}
    biases = {name: linear.bias for name, linear in linears.items()}
    names = {v for source in where.values() for v in source.vectors} | {b for b in biases.values() if b}
    vectors = {name: graph.tensors[name].array for name in names}
    before = {**weights}, {**vectors}
    weights = {name: weight.copy() for name, weight in weights.items()}
    folded(weights, vectors, factors, where, biases)

    change = Change()
    change.tensors = {name: Tensor.of(v) for name, v in vectors.items() if v is not before[1][name]}
    for name, linear in linears.items():
        precision, weight = wanted[name], weights[name]
        if precision.bits == 32:
            if not np.array_equal(weight, before[0][name]):
                change.tensors[linear.weight] = Tensor.of(
                    weight if linear.by_output else np.ascontiguousarray(weight.T)
                )
            continue
        moments = None
        if name in seen and seen[name].with_moments:
            s = factors.get(name, np.ones(linear.k, np.float32))
            moments = seen[name].moment() / np.outer(s, s)
        tied, table = head if head and name == "head" else (False, None)
        rounded = table if tied and table else METHODS[precision.method](weight, precision, moments)
        nodes, tensors = quantized_nodes(
            linear, rounded, negative=fits[name].negative if name in fits else 1.0, tied=tied
        )
        change.nodes[name] = nodes
        change.tensors |= tensors
        change.layers.append(
            {
                "name": name,
                "bits": precision.bits,
                "block": precision.block,
                "method": rounded.precision.method,
                "smoothed": name in factors,
                "bits_per_weight": round(precision.bits_per_weight, 3),
                "weights": int(weight.size),
                "weight_error": None
                if moments is None
                else float(f"{output_error(weight, rounded.weight(), moments):.4g}"),
            }
        )
    return change


def observe(
    graph: Graph,
    block: Block,
    feeds: Sequence[Feeds],
    states: Sequence[Values],
    kinds: Sequence[NDArray[np.bool_]],
    with_moments: dict[str, bool],
    threads: int,
) -> dict[str, Observed]:
    """What the named products are fed; with second moments where `with_moments` says so. Nothing without samples."""
    if not feeds or not with_moments:
        return {}
    linears = graph.linears()
    seen = {name: Observed(linears[name].k, moments) for name, moments in with_moments.items()}
    inputs = {name: linears[name].node.input[0] for name in seen}
    rows = -(-ROWS // len(feeds))
    rng = np.random.default_rng(0)

    def note(i: int, values: Values) -> None:
        for name, observed in seen.items():
            x = values[inputs[name]].reshape(-1, observed.k)
            kind = kinds[i] if len(x) == len(kinds[i]) else np.full(len(x), kinds[i].all())
            observed.add(x, kind, rows, rng)

    run_block(graph, block, feeds, states, threads, [x for x in inputs.values() if x not in block.cut], note)
    return seen
