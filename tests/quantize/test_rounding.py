"""Rounding methods and the nodes they end in: against onnxruntime's own quantizer, onnx's reference evaluator and plain
arithmetic.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lfm_quantize.graph import FLOAT, Graph, Linear, Tensor
from lfm_quantize.passes.rewrite import embedding_nodes, pack, quantized_nodes
from lfm_quantize.rounding import METHODS, Precision, clipped, gptq, output_error, rtn
from onnx import helper
from onnx.reference import ReferenceEvaluator

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
@settings(max_examples=150, deadline=None)
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


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_methods_are_better_in_order(precision) -> None:
    """On correlated inputs: the output error of gptq is well below that of clipped scales, and that not above round to
    nearest.
    """
    weight, x = weights(64, 256), correlated_inputs(2000, 256)
    moments = x.T @ x / np.float32(len(x))
    error = {
        name: output_error(weight, method(weight, precision, moments).weight(), moments)
        for name, method in METHODS.items()
    }
    assert error["gptq"] < 0.6 * error["clipped"]
    assert error["clipped"] <= error["rtn"] * 1.05
    direct = np.square(x @ (gptq(weight, precision, moments).weight() - weight).T).sum() / np.square(x @ weight.T).sum()
    assert error["gptq"] == pytest.approx(direct, rel=1e-2)


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


# ------------------------------------------------------------------------------------------------------------ nodes


def product(weight: np.ndarray, bias: bool = True) -> tuple[Graph, Linear]:
    """A graph of one product: y = x · Wᵀ (+ b)."""
    n, k = weight.shape
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    node = helper.make_node("Gemm" if bias else "MatMul", inputs, ["y"], "layer")
    tensors = {"w": Tensor.of(np.ascontiguousarray(weight.T)), "b": Tensor.of(np.linspace(-1, 1, n, dtype=np.float32))}
    graph = Graph(
        "one",
        [node],
        tensors,
        {"x": helper.make_tensor_value_info("x", FLOAT, ["rows", k])},
        [helper.make_tensor_value_info("y", FLOAT, ["rows", n])],
    )
    return graph.part(["y"]), graph.linears()["layer"]


def run(graph: Graph, x: np.ndarray) -> np.ndarray:
    return graph.session(1).run(None, {"x": x})[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_kernel_computes_with_these_weights(precision, bias) -> None:
    """onnxruntime's kernels on the packed form give x · weight()ᵀ, but for rounding the inputs to 8 bits."""
    weight, x = weights(24, 192), np.random.default_rng(2).standard_normal((7, 192)).astype(np.float32)
    graph, linear = product(weight, bias)
    rounded = clipped(weight, precision, None)
    nodes, tensors = quantized_nodes(linear, rounded)
    got = run(graph.replaced({"layer": nodes}, tensors), x)
    wanted = x @ rounded.weight().T + (graph.tensors["b"].array if bias else 0)
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()
    for node in nodes:  # with inputs left in fp32 the packed form is exact: the error above is the inputs' alone
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
                exact = run(graph.replaced({"layer": nodes}, tensors), x)
                np.testing.assert_allclose(exact, wanted, atol=2e-5 * np.abs(wanted).max())


def test_fused_int8_equals_its_unfused_twin(tmp_path) -> None:
    """DynamicQuantizeMatMul against DynamicQuantizeLinear, MatMulInteger and Mul, evaluated by onnx's own reference."""
    weight = weights(16, 64)
    x = np.random.default_rng(3).standard_normal((9, 64)).astype(np.float32)
    x[4] *= 500
    x[5] = 0
    graph, linear = product(weight, bias=False)
    rounded = rtn(weight, Precision(8), None)
    nodes, tensors = quantized_nodes(linear, rounded)
    fused = graph.replaced({"layer": nodes}, tensors)
    (contrib,) = [n for n in nodes if n.domain]
    inner, codes, scales = contrib.input
    twin = [
        helper.make_node("DynamicQuantizeLinear", [inner], ["q", "step", "zero"]),
        helper.make_node("MatMulInteger", ["q", codes, "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["values"], to=FLOAT),
        helper.make_node("Mul", ["values", "step"], ["once"]),
        helper.make_node("Mul", ["once", scales], [contrib.output[0]]),
    ]
    unfused = fused.replaced({contrib.name: twin}, {})
    unfused.save(tmp_path / "unfused.onnx")
    (wanted,) = ReferenceEvaluator(onnx.load(tmp_path / "unfused.onnx")).run(None, {"x": x})
    np.testing.assert_allclose(run(fused, x), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert not run(fused, x)[5].any()


def test_every_token_has_its_own_range() -> None:
    """One huge token does not spoil the others; with one range for the whole tensor (dynamic quantization as it comes)
    it does.
    """
    weight = weights(32, 128)
    x = np.random.default_rng(4).standard_normal((20, 128)).astype(np.float32)
    x[7] *= 3000
    exact = x @ weight.T
    graph, linear = product(weight, bias=False)
    rounded = rtn(weight, Precision(8), None)
    nodes, tensors = quantized_nodes(linear, rounded)
    per_tensor = helper.make_node(
        "DynamicQuantizeMatMul", ["x", "layer.weight_int8", "layer.scales"], ["y"], domain="com.microsoft"
    )

    def cosines(replacement) -> np.ndarray:
        got = run(graph.replaced({"layer": replacement}, tensors), x)
        return (got * exact).sum(1) / (np.linalg.norm(got, axis=1) + 1e-9) / np.linalg.norm(exact, axis=1)

    assert cosines(nodes).min() > 0.9995
    assert np.median(cosines([per_tensor])) < 0.5


def test_range_below_zero() -> None:
    """After Gelu nearly all of the range is above zero: asking for less below makes the rounding of inputs finer."""
    from lfm_quantize.passes.smooth import fake_rows

    z = np.random.default_rng(5).standard_normal((64, 128)).astype(np.float32) * 2
    x = z * (z > 0) + np.float32(-0.1) * (z <= 0)
    x[0] = -0.1  # a token where nothing is active: its range is all below zero
    weight = weights(32, 128)
    graph, linear = product(weight, bias=False)
    exact = x @ rtn(weight, Precision(8), None).weight().T
    errors = {}
    for negative in (1.0, 0.125):
        nodes, tensors = quantized_nodes(linear, rtn(weight, Precision(8), None), negative=negative)
        got = run(graph.replaced({"layer": nodes}, tensors), x)
        errors[negative] = np.square(got - exact).sum()
        simulated = fake_rows(x, negative) @ rtn(weight, Precision(8), None).weight().T
        assert np.square(simulated - exact).sum() == pytest.approx(errors[negative], rel=0.25)
    assert errors[0.125] < 0.5 * errors[1.0]


@pytest.mark.parametrize(
    "precision", [Precision(8), Precision(4, 32), Precision(4, 32, zero_points=True), Precision(4, 64)], ids=str
)
def test_table_looked_up_and_multiplied(precision) -> None:
    """The two forms of the embedding table are the same numbers from the same bytes."""
    table = weights(33, 192)  # 33 rows of 3 blocks: an odd number of zero points
    rounded = clipped(table, precision, None)
    gather = helper.make_node("Gather", ["table", "ids"], ["y"], "look_up")
    embed = Graph(
        "embed",
        [gather],
        {"table": Tensor.of(table)},
        {"ids": helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1, "n"])},
        [helper.make_tensor_value_info("y", FLOAT, [1, "n", 192])],
    )
    nodes, tensors = embedding_nodes(gather, rounded)
    ids = np.array([[0, 32, 5, 5]])
    (got,) = embed.replaced({"look_up": nodes}, tensors).session(1).run(None, {"ids": ids})
    np.testing.assert_allclose(got[0], rounded.weight()[ids[0]], rtol=1e-6, atol=1e-7)

    graph, linear = product(table, bias=False)
    head, head_tensors = quantized_nodes(linear, rounded, tied=True)
    shared = [name for name in tensors if name in head_tensors]
    assert any("weight" in name for name in shared)
    for name in shared:
        assert tensors[name].data.tobytes() == head_tensors[name].data.tobytes()
    x = np.random.default_rng(6).standard_normal((4, 192)).astype(np.float32)
    wanted = x @ rounded.weight().T
    assert np.abs(run(graph.replaced({"layer": head}, head_tensors), x) - wanted).max() < 0.02 * np.abs(wanted).max()


@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda v: len(v) % 2 == 0))
def test_packing(codes) -> None:
    packed = pack(np.array(codes, np.uint8))
    assert [half for byte in packed.tolist() for half in (byte & 15, byte >> 4)] == codes


def test_session_copies_nothing_of_the_file(tmp_path) -> None:
    """A session over 64 MB of weights in a data file maps them: it adds far less anonymous memory."""
    graph, _ = product(np.ones((4096, 4096), np.float32), bias=False)
    graph.save(tmp_path / "one.onnx")
    del graph
    code = f"""
import psutil, pathlib, numpy as np
from lfm_quantize.graph import Graph
own = lambda: (m := psutil.Process().memory_full_info()).rss - m.shared
graph = Graph.open(pathlib.Path({str(tmp_path / "one.onnx")!r}))
before = own()
session = graph.session(1)
out = session.run(None, {{"x": np.ones((1, 4096), np.float32)}})[0]
assert (out == 4096).all()
print((own() - before) >> 20)
"""
    used = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert used < 24
