"""Attention in 8 bits against softmax(q kᵀ / √d) v in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import model_of, run
from lfm_quantize.calibrate import block as calibrating
from lfm_quantize.calibrate.block import quantize_block
from lfm_quantize.calibrate.blocks import Feeds, blocks_of
from lfm_quantize.calibrate.spread import HERE
from lfm_quantize.calibrate.trail import Graphs, Part, Trail
from lfm_quantize.graph import linears, open_graph
from lfm_quantize.passes.attention import IntegerAttention, attentions
from lfm_quantize.passes.constants import Constants
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.recipe import Recipe, Rule
from lfm_quantize.rounding import Precision
from lfm_runtime.bundle import Bundle

HEADS, SIZE = 3, 8
WIDTH = HEADS * SIZE
EXPORTED = f"""
one (float[views, patches, {WIDTH}] q, float[views, patches, {WIDTH}] k, float[views, patches, {WIDTH}] v, bool whole)
    => (float[rows, {WIDTH}] y) {{
  [l_attention] a = If (whole) <
    then_branch = whole () => (float[views, patches, {WIDTH}] t) {{
      t = com.microsoft.MultiHeadAttention <num_heads = {HEADS}> (q, k, v) }},
    else_branch = padded () => (float[views, patches, {WIDTH}] e) {{ e = Add (q, v) }}
  >
  shape = Constant <value = int64[2] {{-1, {WIDTH}}}> ()
  flat = Reshape (a, shape)
  [l_out_proj] y = Gemm (flat, w, b)
}}
"""


def model():
    return model_of(EXPORTED, w=np.eye(WIDTH, dtype=np.float32), b=np.zeros(WIDTH, np.float32))


def attended(q, k, v) -> np.ndarray:
    """In float64, view by view and head by head."""
    views, patches, _ = q.shape
    q, k, v = (x.astype(np.float64).reshape(views, patches, HEADS, SIZE).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(SIZE)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = shares / shares.sum(-1, keepdims=True) @ v
    return mixed.transpose(0, 2, 1, 3).reshape(views * patches, WIDTH)


def error(of: np.ndarray, to: np.ndarray) -> float:
    return float(np.linalg.norm(of - to) / np.linalg.norm(to))


def random(rng, views: int = 1, patches: int = 40) -> dict[str, np.ndarray]:
    return {x: rng.standard_normal((views, patches, WIDTH)).astype(np.float32) for x in "qkv"}


@pytest.mark.parametrize(("views", "patches"), [(1, 40), (3, 17), (1, 1), (2, 2)])
def test_it_is_attention(views, patches) -> None:
    given = random(np.random.default_rng(patches), views, patches)
    changed = rewritten(model(), IntegerAttention(["l_attention"]))
    got = run(changed, **given, whole=np.array(True))[0]
    assert error(got, attended(*given.values())) < 0.02
    alone = [run(changed, **{n: x[i : i + 1] for n, x in given.items()}, whole=np.array(True))[0] for i in range(views)]
    np.testing.assert_allclose(got, np.concatenate(alone), rtol=1e-5, atol=1e-6)  # a view does not see the others


def test_what_all_patches_share_costs_nothing() -> None:
    """Keys far from zero in some dimension, values far from zero, dimensions of unlike sizes."""
    given = random(np.random.default_rng(5))
    given["k"][..., 3] += 30
    given["v"] += 10 * np.random.default_rng(6).standard_normal(WIDTH).astype(np.float32)
    given["v"][..., 7] *= 20
    got = run(rewritten(model(), IntegerAttention(["l_attention"])), **given, whole=np.array(True))[0]
    wanted = attended(*given.values())
    assert error(got - wanted.mean(0), wanted - wanted.mean(0)) < 0.05


def test_values_of_zero_and_equal_patches_are_exact() -> None:
    given = {x: np.ones((1, 5, WIDTH), np.float32) * scale for x, scale in zip("qkv", (0, 3, -2), strict=True)}
    got = run(rewritten(model(), IntegerAttention(["l_attention"])), **given, whole=np.array(True))[0]
    np.testing.assert_allclose(got, -2, rtol=1e-6)


def test_padded_views_and_other_names_are_left_alone() -> None:
    given = random(np.random.default_rng(1))
    changed = rewritten(model(), IntegerAttention(["l_attention"]))
    np.testing.assert_array_equal(
        run(changed, **given, whole=np.array(False))[0], run(model(), **given, whole=np.array(False))[0]
    )
    assert not IntegerAttention(["other.attention"])(model()).modified
    assert not attentions(changed), "it is no MultiHeadAttention any more"


@pytest.fixture(scope="module")
def encoder(demo_bundle):
    return open_graph(Bundle.open(demo_bundle).variants["fp32"]["vision_encoder"])


def _before(encoder: ir.Model, feeds: list[Feeds]) -> Trail:
    """Views before an encoder's first block."""
    graphs = Graphs(encoder, encoder, np.zeros((1, 1), np.float32))
    kinds = [np.ones(len(view["pixel_attention_mask"][0]), np.bool_) for view in feeds]
    return Trail(
        HERE,
        [Part(lambda: graphs, feeds, kinds, [(i, 0) for i in range(len(feeds))], len(feeds), 1, [{} for _ in feeds])],
    )


def test_attention_that_8_bits_would_change_stays_fp32(encoder) -> None:
    """Scores a hundred times as large leave each patch with one other: the nearest two are mixed up."""
    rng = np.random.default_rng(0)
    patches = rng.uniform(-1, 1, (1, 8 * 12, 768)).astype(np.float32)
    feeds = [
        {
            "pixel_values": patches,
            "pixel_attention_mask": np.ones((1, 96), np.int64),
            "spatial_shapes": np.array([[8, 12]], np.int64),
        }
    ]
    name = "vision.encoder.layers.1.self_attn.attention"
    packed = linears(encoder)[name.replace("attention", "qkv")]
    weight = packed.stored(packed.weights() * np.repeat([10, 10, 1], packed.n // 3)[:, None].astype(np.float32))
    sharp = rewritten(encoder, Constants({str(packed.weight.name): weight}))
    usual = Recipe.default("int8", "rtn")
    recipe = Recipe((Rule("vision.*.attention", Precision(8)), *usual.rules))
    for graph, eight in ((encoder, True), (sharp, False)):
        trail = _before(graph, feeds)
        for block in blocks_of(graph):
            if name in block.attentions:
                break
            trail = trail.advance(block, [])
        change = quantize_block(graph, block, trail, recipe)
        (record,) = change.attentions
        assert record["name"] == name
        assert record["bits"] == (8 if eight else 32)
        assert (record["error"] <= calibrating.ATTENTION_ERROR) is eight
        made = attentions(rewritten(graph, *change.passes(tied=False)))
        assert (name in made) is not eight
        for pattern in (name, "vision.*", "*"):  # --keep comes first
            assert not quantize_block(graph, block, trail, recipe.keeping([pattern])).attentions
        assert not quantize_block(graph, block, trail, usual).attentions
        assert not quantize_block(graph, block, Trail(HERE, []), recipe).attentions, "nothing to try it on"
