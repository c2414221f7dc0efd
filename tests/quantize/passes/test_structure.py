"""Passes that exchange nodes: each on the smallest graph that has its pattern, changed and left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import constants, kinds, model_of, run, text_of
from lfm_quantize.graph import QuantizeError
from lfm_quantize.passes.biases import FusedBiases
from lfm_quantize.passes.kv import Int8KeysAndValues
from lfm_quantize.passes.likeliest import Likeliest
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.passes.positions import AllPositions
from lfm_quantize.passes.standard import StandardOperators, WithoutBranches
from lfm_runtime.formats.contract import NEXT_MASK, TOP_IDS, TOP_LOGITS

RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (3, 4)).astype(np.float16)
W = RNG.uniform(-1, 1, (4, 4)).astype(np.float16)
B = RNG.uniform(-1, 1, 4).astype(np.float16)

NORM = """
one (float16[3, 4] x) => (float16[3, 4] y, float16[3, 4] total) {
  [product] p = Gemm (x, w, b)
  [sum] total = Add (x, p)
  [norm] y = LayerNormalization <axis = -1, epsilon = 0.001> (total, s, o)
}
"""
GELU = """
one (float16[3, 4] x) => (float16[3, 4] y) {
  [product] p = Gemm (x, w, b)
  [gelu] y = Gelu <approximate = "tanh"> (p)
}
"""


@pytest.mark.parametrize(("text", "operator"), [(NORM, "SkipLayerNormalization"), (GELU, "FastGelu")])
def test_biases_are_added_where_the_values_are_read(text, operator) -> None:
    given = {"w": W, "b": B, **({"s": B, "o": B} if text == NORM else {})}
    plain = model_of(text, **given)
    result = FusedBiases()(model_of(text, **given))
    assert result.modified
    assert kinds(result.model) == {"MatMul": 1, operator: 1}
    for got, wanted in zip(run(result.model, x=X), run(plain, x=X), strict=True):
        np.testing.assert_allclose(got.astype(np.float32), wanted.astype(np.float32), atol=0.02)
    assert not FusedBiases()(result.model).modified


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (GELU.replace('<approximate = "tanh">', ""), "the exact Gelu"),
        (
            GELU.replace("=> (float16[3, 4] y)", "=> (float16[3, 4] y, float16[3, 4] q)").replace(
                "[gelu]", "q = Neg (p) [gelu]"
            ),
            "two readers",
        ),
        (GELU.replace("Gemm (x, w, b)", "Gemm (x, w)"), "no bias"),
    ],
)
def test_other_biases_are_left_alone(text, why) -> None:
    model = model_of(text, w=W, **({"b": B} if ", b)" in text else {}))
    before = text_of(model)
    assert not FusedBiases()(model).modified, why
    assert text_of(model) == before


BRANCHES = """
vision (float16[1, 3, 8] q, bool padded) => (float16[1, 3, 8] y) {
  [block_attention] y = If (padded) <
    then_branch = plain () => (t) { t = com.microsoft.MultiHeadAttention <num_heads = 2> (k, k, k) },
    else_branch = masked () => (e) { e = com.microsoft.MultiHeadAttention <num_heads = 2> (k, k, k, , m) }
  >
}
"""


def branches() -> ir.Model:
    """Attention of an encoder as export builds it: one kind for padded views, one for others."""
    text = BRANCHES.replace("[block_attention]", "k = Mul (q, scale) m = Cast <to = 6> (zeros) [block_attention]")
    model = model_of(text, scale=np.array(0.5, np.float16), zeros=np.zeros(1, np.float16))
    node = next(n for n in model.graph if n.op_type == "If")
    node.name = "block.attention"
    model.graph.register_initializer(
        ir.Value(name="block.qkv.weight", const_value=ir.tensor(np.zeros((8, 24), np.float16)))
    )
    return model


def test_without_branches_computes_as_for_unpadded_views() -> None:
    made = rewritten(branches(), WithoutBranches())
    assert kinds(made) == {"Mul": 1, "MultiHeadAttention": 1}  # and what only the other branch read is gone
    assert made.graph.outputs[0].producer().op_type == "MultiHeadAttention"
    assert not WithoutBranches()(made).modified


def test_attention_in_standard_operators_is_the_softmax_of_its_scores() -> None:
    made = rewritten(branches(), StandardOperators())
    assert not {"If", "MultiHeadAttention"} & set(kinds(made))
    q = RNG.uniform(-1, 1, (1, 3, 8)).astype(np.float16)
    (got,) = run(made, q=q, padded=np.zeros((), np.bool_))
    k = (q[0].astype(np.float32) * 0.5).reshape(3, 2, 4).transpose(1, 0, 2)
    scores = k @ k.transpose(0, 2, 1) / 2
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    wanted = (shares @ k).transpose(1, 0, 2).reshape(1, 3, 8)
    np.testing.assert_allclose(got.astype(np.float32), wanted, atol=2e-3)
    with pytest.raises(QuantizeError, match="already has only standard operators"):
        StandardOperators()(made)


def test_attention_that_export_did_not_build_is_refused() -> None:
    model = branches()
    next(iter(next(n for n in model.graph if n.op_type == "If").attributes["then_branch"].as_graph())).op_type = "Other"
    with pytest.raises(QuantizeError, match="is not attention as lfm-edge export builds it"):
        StandardOperators()(model)
    model = branches()
    del model.graph.initializers["block.qkv.weight"]
    with pytest.raises(QuantizeError, match="stays fp32"):
        StandardOperators()(model)


DECODER = """
one (float[batch, tokens, 4] x, int64[batch, total] attention_mask) => (float[batch, 1, 4] logits, int64[batch, 1] seen) {
  [sum] seen = ReduceSum <keepdims = 1> (attention_mask, axes)
  [last] logits = Slice (x, minus, end, axes)
}
"""


def decoder() -> ir.Model:
    numbers = {"axes": 1, "minus": -1, "end": 1 << 40}
    return model_of(DECODER, **{name: np.array([value]) for name, value in numbers.items()})


def test_the_likeliest_tokens_and_the_next_mask_come_out() -> None:
    made = rewritten(decoder(), Likeliest())
    x = RNG.standard_normal((1, 3, 4)).astype(np.float32)
    mask = np.array([[1, 1, 0]])  # one place is kept for the next token
    names = [value.name for value in made.graph.outputs]
    assert names == ["logits", "seen", TOP_LOGITS, TOP_IDS, NEXT_MASK]
    logits, seen, top, ids, next_mask = run(made, x=x, attention_mask=mask)
    np.testing.assert_array_equal(ids[0, 0], np.argsort(-logits[0, 0]))
    np.testing.assert_array_equal(top[0, 0], -np.sort(-logits[0, 0]))
    assert seen.tolist() == [[2]]  # summed in fp32 now
    assert next_mask.tolist() == [[1, 1, 1]]


def test_positions_are_all_kept_when_the_slices_are_skipped() -> None:
    text = """
    one (float[1, s, 4] x) => (float[1, r, 4] y) {
      [mixed] a = Slice (x, minus, end, axes)
      [residual] b = Slice (x, minus, end, axes)
      [sum] y = Add (a, b)
    }
    """
    numbers = {name: np.array([value]) for name, value in {"axes": 1, "minus": -1, "end": 1 << 40}.items()}
    model = model_of(text, **numbers)
    with pytest.raises(QuantizeError, match="made by an older lfm-edge"):
        AllPositions()(model)
    for node in model.graph:
        node.name = f"text.read.{node.name}"
    made = rewritten(model, AllPositions())
    x = RNG.standard_normal((1, 3, 4)).astype(np.float32)
    np.testing.assert_array_equal(run(made, x=x)[0], 2 * x)
    np.testing.assert_array_equal(run(model, x=x)[0], 2 * x[:, -1:])


def test_attention_of_another_kind_gets_no_int8_keys() -> None:
    model = model_of("one (float[2] x) => (float[2] y) { [attention] y = Neg (x) }")
    with pytest.raises(QuantizeError, match="export the bundle again"):
        Int8KeysAndValues({"past_key_values.2.key": np.ones((2, 4), np.float32)})(model)
    assert constants(model) == {}
