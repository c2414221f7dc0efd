"""Gated feed-forward layers: what `Gates` makes of `Integers`' products, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import constants, kinds, model_of, run, text_of
from lfm_quantize.passes.gates import Gates
from lfm_quantize.passes.integers import Integers, Product
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.rounding import Precision, rtn

HIDDEN, WIDTH = 64, 96
BOTH, END = "feed_forward.w1_w3", "feed_forward.w2"
LAYER = f"""one (float[rows, tokens, {HIDDEN}] x) => (float[rows, tokens, {HIDDEN}] y) {{
    [feed_forward_w1_w3] feed_forward_w1_w3 = MatMul (x, both)
    a, b = Split <axis = 2, num_outputs = 2> (feed_forward_w1_w3)
    sigmoid = Sigmoid (a)
    silu = Mul (a, sigmoid)
    gated = Mul (silu, b)
    [feed_forward_w2] y = MatMul (gated, end)
}}"""


def weights(n: int, k: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, k)).astype(np.float32) * 0.3


def layer(text: str = LAYER) -> ir.Model:
    """Names have points, as exported ones do, which ONNX's text does not take."""
    model = model_of(text, both=weights(2 * WIDTH, HIDDEN).T.copy(), end=weights(HIDDEN, WIDTH).T.copy())
    for n in model.graph:
        for named in (n, *n.outputs):
            named.name = str(named.name).replace("forward_", "forward.")
    return model


def integers(both: Precision, end: Precision) -> Integers:
    rounded = {BOTH: rtn(weights(2 * WIDTH, HIDDEN), both, None), END: rtn(weights(HIDDEN, WIDTH), end, None)}
    return Integers({name: Product(each) for name, each in rounded.items()})


def inputs() -> np.ndarray:
    """Tokens of very different size, and one of zeros."""
    x = np.random.default_rng(1).standard_normal((2, 5, HIDDEN)).astype(np.float32)
    return x * np.array([1, 1e-3, 0, 4, 1], np.float32)[:, None]


def test_two_products_give_what_one_and_a_split_gave() -> None:
    plain = layer()
    before = rewritten(plain, integers(Precision(8), Precision(8)))
    after = rewritten(before, Gates())
    (wanted,), (got,), (exact,) = (run(model, x=inputs()) for model in (before, after, plain))
    # A factor that comes later can move an input of w2 that lies between two steps: one step of its row's 127.
    assert (np.abs(got - wanted).max(-1) <= np.abs(wanted).max(-1) / 50).all()
    assert not got[:, 2].any()
    size = np.linalg.norm(exact)
    assert np.linalg.norm(got - exact) / size == pytest.approx(np.linalg.norm(wanted - exact) / size, rel=0.1)


def test_the_wide_values_are_neither_copied_nor_scaled_twice() -> None:
    before = rewritten(layer(), integers(Precision(8), Precision(8)))
    after = rewritten(before, Gates())
    less, more = kinds(before) - kinds(after), kinds(after) - kinds(before)
    assert (less, more) == ({"Split": 1}, {"MatMulIntegerToFloat": 1, "Mul": 1})  # this Mul is of two numbers a token
    halves = [constants(after)[f"feed_forward.{name}.weight_int8"] for name in ("w1", "w3")]
    np.testing.assert_array_equal(np.hstack(halves), constants(before)[f"{BOTH}.weight_int8"])
    assert f"{BOTH}.weight_int8" not in constants(after)


@pytest.mark.parametrize(("both", "end"), [(8, 4), (4, 8), (4, 4)])
def test_layers_with_a_product_in_4_bits_are_left_alone(both, end) -> None:
    made = rewritten(layer(), integers(*(Precision(8) if bits == 8 else Precision(4, 32) for bits in (both, end))))
    before = text_of(made)
    assert not Gates()(made).modified
    assert text_of(made) == before


@pytest.mark.parametrize("value", ["feed_forward_w1_w3", "b", "gated"])
@pytest.mark.parametrize("how", ["read", "given"])
def test_values_with_another_reader_are_left_alone(value, how) -> None:
    """For it they have to be what they are."""
    name, more = (value, "") if how == "given" else ("other", f"other = Neg ({value})\n}}")
    width = 2 * WIDTH if value == "feed_forward_w1_w3" else WIDTH
    text = LAYER.replace(") {", f", float[rows, tokens, {width}] {name}) {{")
    made = rewritten(layer(text.removesuffix("}") + (more or "}")), integers(Precision(8), Precision(8)))
    assert not Gates()(made).modified
