"""Weights to integers. Each method is one function: a weight matrix, how many bits and inputs a scale, and what was
observed of the inputs. METHODS names them. Elsewhere only gptq is named: what it needs, and where
it is the default.

Sources: GPTQ, Frantar et al. 2022 (arXiv 2210.17323); the scale search is that of AWQ's clipping, Lin et al. 2023
(arXiv 2306.00978), weighted by the inputs' second moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Codes = NDArray[Any]
"""uint8 0…15 for 4 bits, int8 for 8."""


@dataclass(frozen=True)
class Precision:
    """How a weight matrix is kept. 32 bits: as it is; 8: one scale an output; 4: one scale for every `block` inputs of
    an output.
    """

    bits: int
    block: int = 0
    method: str = "rtn"
    zero_points: bool = False

    @property
    def bits_per_weight(self) -> float:
        """With scales (16 bits each for 4-bit weights) and zero points."""
        return self.bits + (16 + 4 * self.zero_points) / self.block if self.bits == 4 else float(self.bits)


@dataclass(frozen=True)
class Rounded:
    """A weight matrix as integers: weight[n, k] = (codes[n, k] - zero_points[n, b]) · scales[n, b], b = k // block."""

    codes: Codes  # [n, k]
    scales: Float  # [n, blocks]
    zero_points: NDArray[np.uint8] | None  # [n, blocks]; None is 8 for 4 bits, 0 for 8
    precision: Precision

    def weight(self) -> Float:
        """[n, k], what the kernels compute with."""
        n, k = self.codes.shape
        if self.precision.bits == 8:
            return self.codes * self.scales
        zero = np.float32(8) if self.zero_points is None else self.zero_points.astype(np.float32)[..., None]
        blocks = self.scales.shape[1]
        padded = np.pad(self.codes.astype(np.float32), ((0, 0), (0, blocks * self.precision.block - k)))
        weight: Float = (padded.reshape(n, blocks, -1) - zero) * self.scales[..., None]
        return weight.reshape(n, -1)[:, :k]


Method = Callable[[Float, Precision, "Float | None"], Rounded]
"""(weight [n, k], precision, second moments of the inputs [k, k] or None where nothing was observed) → integers."""


def rtn(weight: Float, precision: Precision, moments: Float | None) -> Rounded:
    """Round to nearest, largest magnitude at the end of the range: what onnxruntime's own default does."""
    del moments
    scales, zero_points = _grid(weight, precision, np.ones(weight.shape[1], np.float32), (1.0,))
    return Rounded(_codes(weight, scales, zero_points, precision), scales, zero_points, precision)


def clipped(weight: Float, precision: Precision, moments: Float | None) -> Rounded:
    """Round to nearest; each scale is the one with the least error, inputs weighted by their power."""
    power = np.ones(weight.shape[1], np.float32) if moments is None else np.diag(moments).astype(np.float32)
    scales, zero_points = _grid(weight, precision, power, _SHRINK)
    return Rounded(_codes(weight, scales, zero_points, precision), scales, zero_points, precision)


def gptq(weight: Float, precision: Precision, moments: Float | None) -> Rounded:
    """Round one input at a time, the most powerful first, and let the inputs not yet rounded make up for the error.

    The scales stand before the first rounding (from `clipped`), so that the order of inputs is free.
    """
    start = clipped(weight, precision, moments)
    if moments is None:
        return start
    n, k = weight.shape
    moments = moments.astype(np.float32, copy=True)
    power = np.diag(moments).copy()
    dead = (
        power <= 0
    )  # inputs that were always zero here, and may not be elsewhere: rounded to nearest, after all others
    typical = np.mean(power[~dead]) if not dead.all() else np.float32(1)
    moments[np.diag_indices(k)] += np.where(dead, np.float32(1e-3), np.float32(_DAMPING)) * typical
    order = np.argsort(-np.diag(moments), kind="stable")
    # H⁻¹ = UᵀU: row i of U tells how an error in input i spreads over those after it. With H = RRᵀ, R upper, U is R⁻¹:
    # no inverse of H.
    backward = order[::-1]
    upper = np.linalg.cholesky(moments[np.ix_(backward, backward)].astype(np.float64))[::-1, ::-1]
    del moments
    spread = _upper_inverse(np.ascontiguousarray(upper)).astype(np.float32)
    del upper
    block = precision.block or k
    owner = order // block  # which scale an input has
    left = weight[:, order].astype(np.float32)
    codes = np.empty((n, k), start.codes.dtype)
    step = 128
    for first in range(0, k, step):
        last = min(first + step, k)
        errors = np.empty((n, last - first), np.float32)
        for i in range(first, last):
            scale = start.scales[:, owner[i]]
            zero = None if start.zero_points is None else start.zero_points[:, owner[i]]
            code = _codes_of(left[:, i], scale, zero, precision.bits)
            codes[:, order[i]] = code
            offset = (8.0 if precision.bits == 4 else 0.0) if zero is None else zero.astype(np.float32)
            error = (left[:, i] - (code.astype(np.float32) - offset) * scale) / spread[i, i]
            left[:, i:last] -= np.outer(error, spread[i, i:last])
            errors[:, i - first] = error
        left[:, last:] -= errors @ spread[first:last, last:]
    return Rounded(codes, start.scales, start.zero_points, precision)


METHODS: dict[str, Method] = {"rtn": rtn, "clipped": clipped, "gptq": gptq}

_DAMPING = 0.01
_SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68)


def _upper_inverse(r: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of an upper triangular matrix, by halves, in its own memory."""
    k = len(r)
    if k <= 64:
        r[:] = np.linalg.inv(r)
        return r
    half = k // 2
    _upper_inverse(r[:half, :half])
    _upper_inverse(r[half:, half:])
    r[:half, half:] = -(r[:half, :half] @ r[:half, half:]) @ r[half:, half:]
    return r


def output_error(weight: Float, rounded: Float, moments: Float) -> float:
    """Relative power of the error at the output: tr(Δ M Δᵀ) / tr(W M Wᵀ)."""

    def power(w: Float) -> float:
        return float(np.einsum("nk,nk->", w @ moments, w, dtype=np.float64))

    return power(weight - rounded) / max(power(weight), 1e-30)


def as_stored(scales: Float) -> Float:
    """Scales as they will be in the file: fp16 where that keeps their precision, else as they are."""
    halves = scales.astype(np.float16)
    return halves.astype(np.float32) if fits_half(scales) else scales


def fits_half(scales: Float) -> bool:
    """Whether fp16 holds these scales with its full precision."""
    sizes = np.abs(scales[scales != 0])
    return not sizes.size or (float(sizes.min()) >= 2.0**-14 and float(sizes.max()) < 65504)


def _grid(
    weight: Float, precision: Precision, power: Float, shrink: tuple[float, ...]
) -> tuple[Float, NDArray[np.uint8] | None]:
    """Scales (and zero points) with the least weighted rounding error among ranges shrunk by these factors."""
    n, k = weight.shape
    if precision.bits == 8:
        scales = np.abs(weight).max(1, keepdims=True) / np.float32(127)
        return np.maximum(scales, np.float32(1e-12)), None
    blocks = -(-k // precision.block)
    pad = blocks * precision.block - k
    grouped = np.pad(weight, ((0, 0), (0, pad))).reshape(n, blocks, precision.block)
    weights = np.pad(power, (0, pad)).reshape(1, blocks, precision.block)
    low, high = grouped.min(2), grouped.max(2)
    best = np.full((n, blocks), np.inf, np.float32)
    scales, zeros = np.ones((n, blocks), np.float32), np.full((n, blocks), 8, np.uint8)
    extreme = np.where(-low > high, low, high)  # the largest magnitude goes to code 0, the end with one step more
    for factor in shrink:
        if precision.zero_points:
            span = np.maximum(high, 0) - np.minimum(low, 0)
            scale = as_stored(np.where(span > 0, span * np.float32(factor / 15), 1).astype(np.float32))
            zero = np.clip(np.round(-np.minimum(low, 0) * np.float32(factor) / scale), 0, 15).astype(np.float32)
        else:
            scale = as_stored(np.where(extreme != 0, extreme * np.float32(-factor / 8), 1).astype(np.float32))
            zero = np.full((n, blocks), 8, np.float32)
        codes = np.clip(np.round(grouped / scale[..., None]) + zero[..., None], 0, 15)
        error = (np.square((codes - zero[..., None]) * scale[..., None] - grouped) * weights).sum(2)
        better = error < best
        best = np.where(better, error, best)
        scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros).astype(np.uint8)
    return scales.astype(np.float32), zeros if precision.zero_points else None


def _codes(weight: Float, scales: Float, zero_points: NDArray[np.uint8] | None, precision: Precision) -> Codes:
    k = weight.shape[1]
    block = precision.block or k
    spread = np.repeat(scales, block, 1)[:, :k]
    zeros = None if zero_points is None else np.repeat(zero_points, block, 1)[:, :k]
    return _codes_of(weight, spread, zeros, precision.bits)


def _codes_of(weight: Float, scale: Float, zero: NDArray[np.uint8] | None, bits: int) -> Codes:
    if bits == 8:
        return np.clip(np.round(weight / scale), -127, 127).astype(np.int8)
    return np.clip(np.round(weight / scale) + (8 if zero is None else zero), 0, 15).astype(np.uint8)
