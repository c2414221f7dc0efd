"""Moves large input channels of a matrix product into its weights, where the layer before can undo it exactly.

x · W = (x / s) · (s W): dividing x by s costs nothing when it can be done once in the weights of what makes x, a norm
or another projection. Sources: SmoothQuant, Xiao et al. 2022 (arXiv 2211.10438), for inputs rounded to 8 bits; AWQ, Lin
et al. 2023 (arXiv 2306.00978), for weights rounded to 4. One search serves both: the candidate whose simulated output
is nearest wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lfm_quantize.calibrate.observe import Observed
from lfm_quantize.graph import constant, linears
from lfm_quantize.rounding import Precision, rtn

Float = NDArray[np.float32]
STRENGTHS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
NEGATIVES = (0.5, 0.25, 0.125, 2.0)
_PARTS = (".self_attn.", ".mlp.", ".conv.", ".feed_forward.")
_NORMS = {
    "qkv": "layer_norm1",
    "fc1": "layer_norm2",
    "qkv_proj": "operator_norm",
    "in_proj": "operator_norm",
    "w1_w3": "ffn_norm",
}
"""A product's part of its layer → the norm that makes its inputs."""
OUTPUTS_TRIED = 384
"""Output channels that a candidate is judged on."""


@dataclass(frozen=True)
class InputSource:
    """Where the inputs of a matrix product can be scaled: constants of a norm, or output channels of an earlier
    product.
    """

    vectors: tuple[str, ...] = ()
    linear: str = ""
    first: int = 0  # of its output channels
    heads: tuple[int, int] = (1, 1)  # query and key/value heads: inputs of heads that share a value must share factors

    def tie(self, factors: Float) -> Float:
        """The factors [k] made equal where they must be."""
        queries, shared = self.heads
        if queries == shared:
            return factors
        grouped = factors.reshape(shared, queries // shared, -1)
        tied: Float = np.broadcast_to(np.exp(np.log(grouped).mean(1, keepdims=True)), grouped.shape).reshape(-1)
        return tied

    def per_channel(self, factors: Float) -> Float:
        """One factor for each of the source's channels."""
        queries, shared = self.heads
        return (
            factors
            if queries == shared
            else np.ascontiguousarray(factors.reshape(shared, queries // shared, -1)[:, 0].reshape(-1))
        )


def sources(model: ir.Model) -> dict[str, InputSource]:
    """For each matrix product whose inputs can be scaled: where."""
    products, found = linears(model), {}
    for name, linear in products.items():
        place, _, part = name.partition(next((p for p in _PARTS if p in name), _PARTS[-1]))
        norm = f"{place}.{_NORMS[part]}" if part in _NORMS else ""
        if name == "projector.linear_1":
            norm = "projector.layer_norm"
        if norm:
            vectors = tuple(v for v in (f"{norm}.weight", f"{norm}.bias") if v in model.graph.initializers)
            if vectors:
                found[name] = InputSource(vectors=vectors)
        elif part == "w2":  # the half that is not gated
            found[name] = InputSource(linear=f"{place}.feed_forward.w1_w3", first=linear.k)
        elif part == "out_proj" and ".conv." in name:
            found[name] = InputSource(linear=f"{place}.conv.in_proj", first=linear.k)  # C, of B, C and the signal
        elif part == "out_proj":
            before = f"{place}.self_attn.qkv" + ("" if name.startswith("vision.") else "_proj")
            made = products[before].n
            values = (made - linear.k) // 2
            size = _head_size(model, place)
            found[name] = InputSource(linear=before, first=made - values, heads=(linear.k // size, values // size))
    return found


def _head_size(model: ir.Model, place: str) -> int:
    norm = model.graph.initializers.get(f"{place}.self_attn.q_layernorm.weight")
    if norm is None or norm.const_value is None:
        return 1  # heads that share nothing need no grouping
    return int(norm.const_value.shape.numpy()[0])


def factors_tried(weight: Float, seen: Observed, source: InputSource) -> Iterable[Float]:
    """Candidates for s [k], geometric mean 1."""
    rows = seen.kept()
    inputs = (np.maximum(seen.largest, 1e-6), np.maximum(np.abs(rows).mean(0), 1e-6))
    outgoing = np.maximum(np.abs(weight).max(0), 1e-6)
    for size in inputs:
        for strength in STRENGTHS:
            s = size**strength / outgoing ** (1 - strength)
            yield source.tie(_centred(s))
    for strength in (0.3, 0.6, 1.0):
        yield source.tie(_centred(inputs[1] ** strength))


def _centred(s: Float) -> Float:
    s = s / np.exp(np.log(s).mean())
    return np.clip(s, 1e-3, 1e3).astype(np.float32)


@dataclass(frozen=True)
class Fit:
    """How a product's inputs are prepared: divided by `factors` [k] (in the source), `negative` of the 8-bit range
    below zero.
    """

    factors: Float
    negative: float = 1.0

    @property
    def smooths(self) -> bool:
        """Whether any input is divided at all."""
        return bool((self.factors != 1).any())


def find_fit(weight: Float, seen: Observed, source: InputSource | None, precision: Precision) -> Fit:
    """The fit with the least simulated output error on the rows seen.

    Args:
        weight: [n, k].
        seen: the inputs.
        source: where inputs can be scaled; None where they cannot.
        precision: 8 or 4 bits.
    """
    rows = seen.kept()
    part = np.ascontiguousarray(weight[np.linspace(0, len(weight) - 1, min(len(weight), OUTPUTS_TRIED)).astype(int)])
    wanted = rows @ part.T

    def error(s: Float, negative: float) -> float:
        x = rows / s
        w = rtn(part * s, precision, None).weight()
        got = (fake_rows(x, negative) if precision.bits == 8 else x) @ w.T
        return float(np.square(got - wanted).sum(dtype=np.float64))

    plain = np.ones(weight.shape[1], np.float32)
    best, least = Fit(plain), error(plain, 1.0)

    def consider(fit: Fit) -> None:
        nonlocal best, least
        if (found := error(fit.factors, fit.negative)) < least * 0.98:  # a change must earn its place
            best, least = fit, found

    if precision.bits == 8:
        for negative in NEGATIVES:
            consider(Fit(plain, negative))
    if source:
        for s in factors_tried(weight, seen, source):
            consider(Fit(s, best.negative))
    return best


def fake_rows(x: Float, negative: float = 1.0) -> Float:
    """Rounded to 8 bits as the int8 graph does to its inputs: each row divided by its range, then one step size for
    what is left.
    """
    span = np.maximum(np.maximum(x.max(1, keepdims=True), x.min(1, keepdims=True) / -np.float32(negative)), 1e-20)
    unit = x / span
    step = max(float(unit.max()) - min(float(unit.min()), 0.0), 1e-20) / 255
    rounded: Float = np.round(unit / np.float32(step)) * (np.float32(step) * span)
    return rounded


@dataclass
class Folded:
    """What factors change: weights [n, k] of products, and constants of norms and biases, by name."""

    weights: dict[str, Float]
    vectors: dict[str, Float]


def fold(model: ir.Model, factors: Mapping[str, Float]) -> Folded:
    """Apply factors s [k], by product: multiply its weights' input channels, divide what makes its inputs. Computed in
    fp32, the graph gives the same values with the changed constants; it is not changed here.
    """
    products, where, constants = linears(model), sources(model), model.graph.initializers
    folded = Folded({}, {})

    def weights(name: str) -> Float:
        return folded.weights.setdefault(name, products[name].weights().copy())

    def vector(name: str) -> Float:
        return folded.vectors.setdefault(name, constant(constants[name]).astype(np.float32))

    for name, s in factors.items():
        folded.weights[name] = weights(name) * s
        source = where[name]
        for norm in source.vectors:
            folded.vectors[norm] = vector(norm) / s
        if source.linear:
            per_channel = source.per_channel(s)
            span = slice(source.first, source.first + len(per_channel))
            weights(source.linear)[span] /= per_channel[:, None]
            if bias := products[source.linear].bias:
                vector(bias)[span] /= per_channel
    return folded
