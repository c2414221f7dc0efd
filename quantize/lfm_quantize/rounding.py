"""Weights to integers. Each method is one function: a weight matrix, how many bits and inputs a scale, and what was
observed of the inputs. METHODS names them. Elsewhere they are named
only where one is the default.

Sources: GPTQ, Frantar et al. 2022 (arXiv 2210.17323); the scale search is that of AWQ's clipping, Lin et al. 2023
(arXiv 2306.00978), weighted by the inputs' second moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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

    def __getitem__(self, rows: NDArray[np.intp]) -> Float:
        """Some rows of `weight`, [m, k]: of an embedding table, which in fp32 may have 1 GB."""
        zeros = None if self.zero_points is None else self.zero_points[rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zero_points=zeros).weight()


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

    With second moments H = R·Rᵀ, R upper triangular, the error at the output is that of n triangular systems, and each
    input is rounded after the errors of those before it, e, have been added: w[j] + Σᵢ e[i]·R[i, j] / R[j, j], i < j.
    That is GPTQ without the inverse of H (Babai's nearest plane; Chen et al. 2025, arXiv 2507.18553).

    The scales stand before the first rounding (those of `clipped`), so that the order of inputs is free.
    """
    if moments is None:
        return clipped(weight, precision, None)
    n, k = weight.shape
    scales, zero_points = _grid(weight, precision, np.diag(moments).astype(np.float32), _SHRINK)
    order, follow = _elimination(moments)
    grid = np.ascontiguousarray(scales.T), None if zero_points is None else np.ascontiguousarray(zero_points.T)
    owner = order // (precision.block or k)  # which scale an input has
    codes = np.empty((n, k), np.uint8 if precision.bits == 4 else np.int8)
    for first in range(0, n, _ROWS):
        rows = slice(first, first + _ROWS)
        wanted = np.ascontiguousarray(weight[rows].T[order], np.float32)
        scale, zero = (None if part is None else part[:, rows] for part in grid)
        assert scale is not None
        codes[rows, order] = _one_by_one(wanted, follow, scale, zero, owner, precision.bits).T
    return Rounded(codes, scales, zero_points, precision)


def gptq_local(weight: Float, precision: Precision, moments: Float | None) -> Rounded:
    """GPTQ within each 1,024 inputs: errors are not made up for across their borders. For wide matrices it takes a
    fraction of the time, which grows with the cube of the inputs.
    """
    if moments is None or precision.bits == 8:  # 8 bits: one scale for all inputs
        return gptq(weight, precision, moments)
    spans = [slice(first, first + _LOCAL) for first in range(0, weight.shape[1], _LOCAL)]
    parts = [gptq(np.ascontiguousarray(weight[:, s]), precision, moments[s, s]) for s in spans]
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    codes, scales = (np.concatenate([getattr(p, name) for p in parts], axis=1) for name in ("codes", "scales"))
    return Rounded(codes, scales, np.concatenate(zeros, axis=1) if zeros else None, precision)


def _elimination(moments: Float) -> tuple[NDArray[np.intp], Float]:
    """The order in which inputs are rounded [k], and R[i, j] / R[j, j] for i < j, transposed [k, k], in that order."""
    power = np.diag(moments).astype(np.float64)
    dead = power <= 0  # always zero here, and maybe not elsewhere: rounded to nearest, after all others
    typical = np.mean(power[~dead]) if not dead.all() else 1.0
    damping = np.where(dead, 1e-3, _DAMPING) * typical
    order = np.argsort(-(power + damping), kind="stable")
    backward = order[::-1]  # LAPACK's factor is lower triangular; backwards it is the upper one
    damped = moments[np.ix_(backward, backward)].astype(np.float64)
    damped[np.diag_indices(len(power))] += damping[backward]
    factor = np.linalg.cholesky(damped)
    del damped
    follow = np.ascontiguousarray(factor[::-1, ::-1].T, np.float32)
    follow /= np.diag(follow)[:, None].copy()
    return order, follow


def _one_by_one(
    wanted: Float, follow: Float, scales: Float, zeros: NDArray[np.uint8] | None, owner: NDArray[np.intp], bits: int
) -> Codes:
    """Codes [k, m] of weights [k, m], whose inputs stand in the order of rounding; scales and zeros [blocks, m]."""
    errors = np.empty_like(wanted)
    codes = np.empty(wanted.shape, np.uint8 if bits == 4 else np.int8)
    for first in range(0, len(wanted), _STEP):
        last = min(first + _STEP, len(wanted))
        target = wanted[first:last] + follow[first:last, :first] @ errors[:first]
        for i in range(first, last):
            scale = scales[owner[i]]
            zero = None if zeros is None else zeros[owner[i]]
            codes[i] = code = _codes_of(target[i - first], scale, zero, bits)
            offset = np.float32(8 if bits == 4 else 0) if zero is None else zero.astype(np.float32)
            errors[i] = wanted[i] - (code.astype(np.float32) - offset) * scale
            target[i - first + 1 :] += follow[i + 1 : last, i, None] * errors[i]
    return codes


METHODS: dict[str, Method] = {"rtn": rtn, "clipped": clipped, "gptq": gptq, "gptq-local": gptq_local}
COMPENSATING = ("gptq", "gptq-local")
"""Those that need second moments, and make up for what coarse scales lose."""

_DAMPING = 0.01
_ROWS, _STEP = 1024, 32
"""Outputs rounded together, and inputs between two products with all errors before them: both fit the caches."""
_LOCAL = 1024
"""Inputs that gptq_local takes together: a multiple of every block."""
_CHUNK = 1 << 16
"""Weights worked on together: the arrays in between fit the caches, and a table of 1 GB needs no other of its size."""
_SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68)


def output_error(weight: Float, rounded: Float, moments: Float) -> float:
    """Relative power of the error at the output, tr(Δ M Δᵀ) / tr(W M Wᵀ), over at most 512 of the outputs."""
    some = slice(None, None, -(-len(weight) // 512))
    weight, rounded = weight[some], rounded[some]

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
        largest = np.empty((n, 1), np.float32)
        for rows in _chunks(weight):
            largest[rows] = np.abs(weight[rows]).max(1, keepdims=True)
        return np.maximum(largest / np.float32(127), np.float32(1e-12)), None
    blocks = -(-k // precision.block)
    pad = blocks * precision.block - k
    weights = np.pad(power, (0, pad)).reshape(1, blocks, precision.block)
    scales, zeros = np.empty((n, blocks), np.float32), np.empty((n, blocks), np.uint8)
    for rows in _chunks(weight):
        grouped = np.pad(weight[rows], ((0, 0), (0, pad))).reshape(-1, blocks, precision.block)
        scales[rows], zeros[rows] = _best_scales(grouped, weights, shrink, zero_points=precision.zero_points)
    return scales, zeros if precision.zero_points else None


def _best_scales(
    grouped: Float, weights: Float, shrink: tuple[float, ...], *, zero_points: bool
) -> tuple[Float, Float]:
    """Scales and zero points [n, blocks] of 4-bit weights [n, blocks, block]."""
    low, high = grouped.min(2), grouped.max(2)
    best = np.full(low.shape, np.inf, np.float32)
    scales, zeros = np.ones(low.shape, np.float32), np.full(low.shape, 8, np.float32)
    extreme = np.where(-low > high, low, high)  # the largest magnitude goes to code 0, the end with one step more
    zero = np.full(low.shape, 8, np.float32)
    codes = np.empty_like(grouped)
    for factor in shrink:
        if zero_points:
            span = np.maximum(high, 0) - np.minimum(low, 0)
            scale = as_stored(np.where(span > 0, span * np.float32(factor / 15), 1).astype(np.float32))
            zero = np.clip(np.round(-np.minimum(low, 0) * np.float32(factor) / scale), 0, 15).astype(np.float32)
        else:
            scale = as_stored(np.where(extreme != 0, extreme * np.float32(-factor / 8), 1).astype(np.float32))
        np.divide(grouped, scale[..., None], out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, -zero[..., None], 15 - zero[..., None], out=codes)
        codes *= scale[..., None]
        codes -= grouped
        np.square(codes, out=codes)
        codes *= weights
        error = codes.sum(2)
        better = error < best
        best = np.where(better, error, best)
        scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
    return scales, zeros


def _codes(weight: Float, scales: Float, zero_points: NDArray[np.uint8] | None, precision: Precision) -> Codes:
    k = weight.shape[1]
    block = precision.block or k
    codes = np.empty(weight.shape, np.uint8 if precision.bits == 4 else np.int8)
    for rows in _chunks(weight):
        spread = np.repeat(scales[rows], block, 1)[:, :k]
        zeros = None if zero_points is None else np.repeat(zero_points[rows], block, 1)[:, :k]
        codes[rows] = _codes_of(weight[rows], spread, zeros, precision.bits)
    return codes


def _chunks(weight: Float) -> Iterator[slice]:
    """Rows of a weight matrix [n, k] that are worked on together."""
    step = max(1, _CHUNK // weight.shape[1])
    return (slice(first, first + step) for first in range(0, len(weight), step))


def _codes_of(weight: Float, scale: Float, zero: NDArray[np.uint8] | None, bits: int) -> Codes:
    if bits == 8:
        return np.clip(np.round(weight / scale), -127, 127).astype(np.int8)
    return np.clip(np.round(weight / scale) + (8 if zero is None else zero), 0, 15).astype(np.uint8)
