"""Passes that change the types of values: fp16 and back, constants exchanged or stored smaller."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import constants, kinds, model_of, run, text_of
from lfm_quantize.passes.constants import Constants, StoredAsHalf
from lfm_quantize.passes.half import Half
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.passes.widen import Widen

X = np.random.default_rng(0).uniform(-1, 1, (2, 4)).astype(np.float32)
W = np.random.default_rng(1).uniform(-1, 1, (4, 4)).astype(np.float32)
LAYERS = """
one (float[rows, 4] inputs_embeds, int64[rows] mask) => (float[rows, 4] logits, int64[1] count) {
  [first] a = MatMul (inputs_embeds, w)
  [second] b = Tanh (a)
  [third] logits = MatMul (b, w)
  [counted] count = ReduceSum <keepdims = 1> (mask)
}
"""


def test_half_computes_between_fp32_edges_in_fp16() -> None:
    plain = model_of(LAYERS, w=W)
    made = rewritten(plain, Half())
    assert constants(made)["w"].dtype == np.float16
    assert kinds(made)["Cast"] == 2  # in and out
    assert [value.dtype for value in made.graph.outputs] == [ir.DataType.FLOAT, ir.DataType.INT64]
    feeds = {"inputs_embeds": X, "mask": np.array([1, 1])}
    for got, wanted in zip(run(made, **feeds), run(plain, **feeds), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-3)


def test_half_leaves_named_nodes_in_fp32() -> None:
    """With casts around them, and a constant in both types where nodes of both types read it."""
    made = rewritten(model_of(LAYERS, w=W), Half({"third"}))
    known = constants(made)
    assert (known["w"].dtype, known["w.fp32"].dtype) == (np.float16, np.float32)
    third = next(n for n in made.graph if n.name == "third")
    assert third.inputs[1].name == "w.fp32"
    feeds = {"inputs_embeds": X, "mask": np.array([1, 1])}
    np.testing.assert_allclose(run(made, **feeds)[0], run(model_of(LAYERS, w=W), **feeds)[0], atol=2e-3)


def test_widened_half_is_the_graph_it_was_made_of() -> None:
    """Up to the weights' rounding: these are fp16 numbers from the start."""
    exact = W.astype(np.float16).astype(np.float32)
    result = Widen()(rewritten(model_of(LAYERS, w=exact), Half()))
    assert result.modified
    np.testing.assert_array_equal(constants(result.model)["w"], exact)
    feeds = {"inputs_embeds": X, "mask": np.array([1, 1])}
    np.testing.assert_allclose(run(result.model, **feeds)[0], run(model_of(LAYERS, w=exact), **feeds)[0], rtol=1e-6)
    assert not Widen()(model_of(LAYERS, w=W)).modified


def test_a_constant_stored_as_half_is_read_in_fp32() -> None:
    text = "one (float[rows, 4] x) => (float[rows, 4] y) { [sum] y = Add (x, w) }"
    plain = model_of(text, w=W[:2])
    made = rewritten(plain, StoredAsHalf("w"))
    assert {name: value.dtype for name, value in constants(made).items()} == {"w.fp16": np.float16}
    np.testing.assert_allclose(run(made, x=X)[0], X + W[:2].astype(np.float16), rtol=1e-6)


def test_constants_exchanges_those_that_are_there() -> None:
    plain = model_of(LAYERS, w=W)
    assert not Constants({"elsewhere": W})(plain).modified
    assert text_of(plain) == text_of(model_of(LAYERS, w=W))
    made = rewritten(plain, Constants({"w": 2 * W}))
    np.testing.assert_array_equal(constants(made)["w"], 2 * W)
    np.testing.assert_array_equal(constants(plain)["w"], W)  # the first one is another graph


@pytest.mark.parametrize("name", ["first", "third"])
def test_a_copy_shares_no_node_with_its_origin(name) -> None:
    plain = model_of(LAYERS, w=W)
    before = text_of(plain)
    rewritten(plain, Half({name}))
    assert text_of(plain) == before
