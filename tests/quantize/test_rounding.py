"""Rounding methods: against onnxruntime's own quantizer and plain arithmetic."""

from __future__ import annotations

import argparse
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lfm_quantize.cli import add_arguments
from lfm_quantize.rounding import METHODS, Precision, clipped, gptq, gptq_local, output_error, rtn

PRECISIONS = [Precision(8), *(Precision(4, b, zero_points=z) for b in (32, 64, 128) for z in (False, True))]


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, (n, k)).astype(np.float32) * 0.05


def correlated_inputs(rows: int, k: int, seed: int = 1) -> np.ndarray:
    """Few directions carry most of the power, as in hidden states."""
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((k // 8, k)) * np.geomspace(4, 0.1, k // 8)[:, None]
    return (rng.standard_normal((rows, k // 8)) @ basis + 0.1 * rng.standard_normal((rows, k))).astype(np.float32)


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 200),
    seed=st.integers(0, 1000),
    which=st.sampled_from(PRECISIONS),
    scale=st.floats(1e-6, 1e4),
)
@settings(max_examples=150)
def test_round_to_nearest(n, k, seed, which, scale) -> None:
    """Codes stay in their range, and no weight is further from itself than half a step (fp16 scales: and their
    rounding).
    """
    weight = weights(n, k, seed) * np.float32(scale)
    found = rtn(weight, which, None)
    assert found.codes.shape == (n, k)
    if which.bits == 8:
        assert np.abs(found.codes.astype(int)).max() <= 127
    else:
        assert found.codes.max() <= 15
    step = np.repeat(np.abs(found.scales), which.block or k, axis=1)[:, :k]
    # The range is not symmetric: the end opposite to the largest magnitude may be cut by half a step more.
    allowed = (0.5 if which.bits == 8 or which.zero_points else 1.0) * step * 1.01 + 0.02 * np.abs(weight)
    assert (np.abs(found.weight() - weight) <= allowed + 1e-12).all()


@pytest.mark.parametrize("block", [32, 64, 128])
def test_rtn_is_onnxruntimes(block) -> None:
    """Against the C++ of onnxruntime's default quantizer; it keeps fp32 scales, ours are fp16."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    weight = weights(48, 256)
    n, k = weight.shape
    packed = np.zeros((n, k // block, block // 2), np.uint8)
    scales, zeros = np.zeros(n * k // block, np.float32), np.zeros((n * (k // block) + 1) // 2, np.uint8)
    quantize_matmul_4bits(packed, np.ascontiguousarray(weight.T), scales, zeros, block, n, k, True)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(n, k)
    theirs = (codes.astype(np.float32) - 8) * np.repeat(scales.reshape(n, -1), block, 1)
    ours = rtn(weight, Precision(4, block), None).weight()
    assert (
        np.mean(np.abs(ours - theirs) > 1e-3 * np.abs(weight).max()) < 0.01
    )  # a code at a tie may fall to the other side
    assert np.square(ours - weight).sum() < 1.01 * np.square(theirs - weight).sum()


def test_tables_are_rounded_in_little_more_memory_than_their_codes() -> None:
    """Of a vocabulary of 128,000 the table is 1 GB; a copy of it, or an array of its kind, would be as large."""
    weight = np.random.default_rng(0).standard_normal((16384, 512), np.float32)
    for precision in (Precision(8), Precision(4, 32)):
        tracemalloc.start()
        rounded = rtn(weight, precision, None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        kept = rounded.codes.nbytes + rounded.scales.nbytes
        assert kept <= weight.nbytes / 2
        assert peak < kept + weight.nbytes / 4, precision
        np.testing.assert_array_equal(rounded[np.array([7, 3, 7])], rounded.weight()[[7, 3, 7]])


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_methods_are_better_in_order(precision) -> None:
    """On correlated inputs: no method is worse than round to nearest, and gptq is well below clipped scales."""
    weight, x = weights(64, 256), correlated_inputs(2000, 256)
    moments = x.T @ x / np.float32(len(x))
    error = {
        name: output_error(weight, method(weight, precision, moments).weight(), moments)
        for name, method in METHODS.items()
    }
    assert error["gptq"] < 0.6 * error["clipped"]
    for name in METHODS:
        assert error[name] <= error["rtn"] * 1.05, name
    direct = np.square(x @ (gptq(weight, precision, moments).weight() - weight).T).sum() / np.square(x @ weight.T).sum()
    assert error["gptq"] == pytest.approx(direct, rel=1e-2)


@pytest.mark.parametrize("precision", [Precision(8), Precision(4, 32), Precision(4, 64, zero_points=True)], ids=str)
def test_gptq_is_what_the_paper_says(precision) -> None:
    """Against the algorithm as it stands there, with the inverse of the second moments, an input at a time."""
    weight, x = weights(16, 192), correlated_inputs(600, 192)
    moments = x.T @ x / np.float32(len(x))
    found = gptq(weight, precision, moments)
    damped = moments.astype(np.float64) + 0.01 * np.diag(moments).mean() * np.eye(192)
    order = np.argsort(-np.diag(damped), kind="stable")
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    left = weight[:, order].astype(np.float64)
    block = precision.block or 192
    top, zero = (127, 0) if precision.bits == 8 else (15, 8)
    wanted = np.empty(weight.shape)
    for i, at in enumerate(order):
        scale = found.scales[:, at // block].astype(np.float64)
        offset = zero if found.zero_points is None else found.zero_points[:, at // block]
        wanted[:, at] = np.clip(np.round(left[:, i] / scale) + offset, -127 if precision.bits == 8 else 0, top)
        error = (left[:, i] - (wanted[:, at] - offset) * scale) / inverse[0, 0]
        left[:, i + 1 :] -= np.outer(error, inverse[0, 1:])
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    # A value at a tie may fall to the other side, and what follows in its row with it.
    assert np.mean(found.codes == wanted) > 0.99


def test_gptq_in_parts_of_wide_matrices() -> None:
    """The same where one part is all; else between scales alone and the whole."""
    weight, x = weights(24, 2304), correlated_inputs(3000, 2304)
    moments = x.T @ x / np.float32(len(x))
    narrow = Precision(4, 64), moments[:512, :512]
    assert np.array_equal(gptq_local(weight[:, :512], *narrow).codes, gptq(weight[:, :512], *narrow).codes)
    for precision in (Precision(4, 128), Precision(4, 64, zero_points=True)):
        whole, parts, scales = (
            output_error(weight, method(weight, precision, moments).weight(), moments)
            for method in (gptq, gptq_local, clipped)
        )
        assert whole < parts < scales
    assert np.array_equal(gptq_local(weight, Precision(8), moments).codes, gptq(weight, Precision(8), moments).codes)


def test_the_help_names_every_method() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    said = next(action.help for action in parser._actions if action.dest == "method")
    assert all(name in said for name in METHODS)


def test_gptq_with_dead_inputs_and_odd_width() -> None:
    """Inputs that are always zero do not disturb the others; a width that blocks do not divide is allowed."""
    weight, x = weights(8, 80), correlated_inputs(500, 80)
    x[:, [3, 40]] = 0
    moments = x.T @ x / np.float32(len(x))
    found = gptq(weight, Precision(4, 32), moments)
    assert np.isfinite(found.weight()).all()
    assert output_error(weight, found.weight(), moments) < output_error(
        weight, rtn(weight, Precision(4, 32), None).weight(), moments
    )
    assert np.array_equal(gptq(weight, Precision(4, 32), None).codes, clipped(weight, Precision(4, 32), None).codes)
