"""Matrix products in integers: changed, left alone, and what onnxruntime's kernels compute with them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphs import constants, kinds, model_of, run, text_of
from hypothesis import given
from hypothesis import strategies as st
from lfm_quantize.calibrate.smooth import fake_rows
from lfm_quantize.graph import save, session
from lfm_quantize.passes.integers import Integers, Product, pack
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.rounding import Precision, clipped, rtn

PRECISIONS = [
    Precision(8),
    *(Precision(4, block, zero_points=zeros) for block in (32, 64, 128) for zeros in (False, True)),
]


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, (n, k)).astype(np.float32) * 0.05


def product(weight: np.ndarray, *, bias: bool = True) -> ir.Model:
    """y = x · Wᵀ (+ b)."""
    n, k = weight.shape
    operation = "Gemm (x, w, b)" if bias else "MatMul (x, w)"
    text = f"one (float[rows, {k}] x) => (float[rows, {n}] y) {{ [layer] y = {operation} }}"
    given = {"w": np.ascontiguousarray(weight.T)}
    return model_of(text, **given, **({"b": np.linspace(-1, 1, n, dtype=np.float32)} if bias else {}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_kernel_computes_with_the_rounded_weights(precision, bias) -> None:
    """onnxruntime's kernels on the packed form give x · weight()ᵀ, but for rounding the inputs to 8 bits."""
    weight, x = weights(24, 192), np.random.default_rng(2).standard_normal((7, 192)).astype(np.float32)
    plain = product(weight, bias=bias)
    rounded = clipped(weight, precision, None)
    made = rewritten(plain, Integers({"layer": Product(rounded)}))
    (got,) = run(made, x=x)
    wanted = x @ rounded.weight().T + (constants(plain)["b"] if bias else 0)
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()
    for n in made.graph:  # with inputs left in fp32 the packed form is exact: the error above is the inputs' alone
        if "accuracy_level" in n.attributes:
            n.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
            np.testing.assert_allclose(run(made, x=x)[0], wanted, atol=2e-5 * np.abs(wanted).max())


def test_products_that_are_not_named_are_left_alone() -> None:
    plain = product(weights(8, 64))
    other = Product(rtn(weights(8, 64), Precision(8), None))
    result = Integers({"elsewhere": other})(plain)
    assert not result.modified
    assert text_of(result.model) == text_of(product(weights(8, 64)))
    assert Integers({"layer": other})(product(weights(8, 64))).modified


def test_a_computed_weight_is_no_product() -> None:
    """A MatMul of two values, as in attention, has nothing to round."""
    model = model_of("one (float[2, 2] x) => (float[2, 2] y) { [layer] y = MatMul (x, x) }")
    assert not Integers({"layer": Product(rtn(weights(2, 2), Precision(8), None))})(model).modified


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("negative", [1.0, 0.125])
def test_rounding_by_rows_equals_its_unfused_twin(bias, negative) -> None:
    """QuantizeLinear along the rows and MatMulIntegerToFloat against NumPy."""
    weight, x = weights(16, 64), np.random.default_rng(3).standard_normal((9, 64)).astype(np.float32)
    x[4] *= 500
    x[5] = 0
    rounded, plain = rtn(weight, Precision(8), None), product(weight, bias=bias)
    made = rewritten(plain, Integers({"layer": Product(rounded, negative)}))
    assert {n.op_type for n in made.graph} >= {"QuantizeLinear", "MatMulIntegerToFloat"}
    steps = 255 / (1 + negative)
    step = np.maximum(np.maximum(x.max(1), x.min(1) / -negative), 1e-20)[:, None] / steps
    zero = round(steps * negative)
    inputs = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    sums = inputs @ rounded.codes.T.astype(np.float64)
    added, (got,) = constants(plain)["b"] if bias else np.zeros(16, np.float32), run(made, x=x)
    rows = [n for n in range(9) if n != 5]
    off = np.abs((got[rows] - added) / (step * rounded.scales[:, 0])[rows] - sums[rows])
    assert np.median(off) < 1
    assert off.max() < 256  # two inputs that lie between two steps, at most
    np.testing.assert_array_equal(got[5], added)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_a_token_gives_the_same_alone_and_among_others(rows, tokens, seed) -> None:
    """In three axes, as in a decoder: whatever else is in the batch, bit for bit."""
    weight = weights(16, 64)
    text = "one (float[rows, tokens, 64] x) => (float[rows, tokens, 16] y) { [layer] y = MatMul (x, w) }"
    plain = model_of(text, w=np.ascontiguousarray(weight.T))
    made = session(rewritten(plain, Integers({"layer": Product(rtn(weight, Precision(8), None))})), 1)
    random = np.random.default_rng(seed)
    x = (random.standard_normal((rows, tokens, 64)) * random.lognormal(0, 3, (rows, tokens, 1))).astype(np.float32)
    (together,) = made.run(None, {"x": x})
    for row in range(rows):
        for token in range(tokens):
            (alone,) = made.run(None, {"x": x[row : row + 1, token : token + 1]})
            np.testing.assert_array_equal(together[row, token], alone[0, 0])


@pytest.mark.parametrize("bias", [False, True])
def test_every_token_has_its_own_range(bias) -> None:
    """One huge token does not spoil the others; with one range for the whole tensor (dynamic quantization as it comes)
    it does.
    """
    weight = weights(32, 128)
    x = np.random.default_rng(4).standard_normal((20, 128)).astype(np.float32)
    x[7] *= 3000
    exact = x @ weight.T
    made = rewritten(product(weight, bias=bias), Integers({"layer": Product(rtn(weight, Precision(8), None))}))
    known = constants(made)
    exact = exact + (constants(product(weight))["b"] if bias else 0)
    per_tensor = model_of(
        "one (float[rows, 128] x) => (float[rows, 32] y) { y = com.microsoft.DynamicQuantizeMatMul (x, w, s) }",
        w=known["layer.weight_int8"],
        s=known["layer.scales"],
    )

    def cosines(model: ir.Model) -> np.ndarray:
        (got,) = run(model, x=x)
        return (got * exact).sum(1) / (np.linalg.norm(got, axis=1) + 1e-9) / np.linalg.norm(exact, axis=1)

    assert cosines(made).min() > 0.9995
    assert np.median(cosines(per_tensor)) < 0.5


@pytest.mark.parametrize("bias", [False, True])
def test_a_smaller_range_below_zero_is_finer_above_it(bias) -> None:
    """After Gelu nearly all of the range is above zero: asking for less below makes the rounding of inputs finer."""
    z = np.random.default_rng(5).standard_normal((64, 128)).astype(np.float32) * 2
    x = z * (z > 0) + np.float32(-0.1) * (z <= 0)
    x[0] = -0.1  # a token where nothing is active: its range is all below zero
    rounded = rtn(weights(32, 128), Precision(8), None)
    exact = x @ rounded.weight().T
    errors = {}
    for negative in (1.0, 0.125):
        plain = product(weights(32, 128), bias=bias)
        made = rewritten(plain, Integers({"layer": Product(rounded, negative)}))
        added = constants(plain)["b"] if bias else 0
        errors[negative] = np.square(run(made, x=x)[0] - added - exact).sum()
        simulated = fake_rows(x, negative) @ rounded.weight().T
        assert np.square(simulated - exact).sum() == pytest.approx(errors[negative], rel=0.25)
    assert errors[0.125] < 0.5 * errors[1.0]


def test_int8_products_do_not_overflow(tmp_path) -> None:
    """Largest weights meet largest inputs: on x86 without VNNI a pair of them leaves 16 bits, unless the runtime asks
    for exactness.
    """
    from lfm_runtime.engine.execution import Execution

    weight = np.ones((8, 256), np.float32)
    made = rewritten(product(weight, bias=False), Integers({"layer": Product(rtn(weight, Precision(8), None))}))
    save(made, tmp_path / "product.onnx")
    x = np.ones((3, 256), np.float32)
    (y,) = ort.InferenceSession(str(tmp_path / "product.onnx"), Execution(1).options()).run(None, {"x": x})
    np.testing.assert_allclose(y, x @ weight.T, rtol=0.01)


def test_a_bias_of_the_products_own_node_is_added_behind_it() -> None:
    made = rewritten(product(weights(8, 64)), Integers({"layer": Product(rtn(weights(8, 64), Precision(4, 32), None))}))
    assert kinds(made) == {"Cast": 1, "MatMulNBits": 1, "Add": 1}


@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda v: len(v) % 2 == 0))
def test_packing_puts_the_first_of_a_pair_in_the_low_half(codes) -> None:
    packed = pack(np.array(codes, np.uint8))
    assert [half for byte in packed.tolist() for half in (byte & 15, byte >> 4)] == codes
