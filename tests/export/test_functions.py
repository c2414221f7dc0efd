"""The operators that a graph brings functions for: kernel, function and NumPy give the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from lfm_export.builder import CONTRIB, IR_VERSION, OPSET
from lfm_export.export import export
from lfm_export.functions import CONVOLUTION, HEAD_NORM, convolution, head_norm
from lfm_runtime.bundle import Bundle
from lfm_runtime.formats.contract import DECODER

RNG = np.random.default_rng(0)


def called(function: ir.Function, feeds: dict, outputs: int, *, kernel: bool, **attributes) -> list[np.ndarray]:
    """The operator in a graph of its own; without its kernel under a name that no release knows."""
    inputs = [
        ir.Value(name=n, shape=ir.Shape(a.shape), type=ir.TensorType(ir.DataType.FLOAT)) for n, a in feeds.items()
    ]
    outs = [ir.Value(name=f"out{n}", type=ir.TensorType(ir.DataType.FLOAT)) for n in range(outputs)]
    node = ir.node(function.name, inputs, attributes or None, domain=CONTRIB, outputs=outs)
    graph = ir.Graph(inputs, outs, nodes=[node], opset_imports={"": OPSET, CONTRIB: 1}, name="one")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=[function]))
    if not kernel:
        model.functions[0].name = model.graph.node[0].op_type = "Unknown"
    return ort.InferenceSession(model.SerializeToString()).run(None, feeds)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "function"])
@pytest.mark.parametrize(("taps", "bias", "tokens"), [(3, False, 1), (3, True, 7), (4, False, 2), (1, False, 3)])
def test_the_convolution(kernel, taps, bias, tokens) -> None:
    x, past = (RNG.standard_normal((2, 6, n)).astype(np.float32) for n in (tokens, taps))
    weights, offset = RNG.standard_normal((6, taps)).astype(np.float32), RNG.standard_normal(6).astype(np.float32)
    padded = np.pad(weights[:, None], ((0, 0), (0, 0), (1, 0)))
    feeds = {"x": x, "taps": padded, "bias": offset if bias else np.zeros_like(offset), "past": past}
    y, present = called(convolution(taps, bias=True), feeds, 2, kernel=kernel)
    full = np.concatenate([past, x], axis=2)
    wanted = np.stack([(full[:, :, t + 1 : t + 1 + taps] * weights).sum(2) for t in range(tokens)], axis=2)
    np.testing.assert_allclose(y, wanted + (offset[:, None] if bias else 0), atol=1e-5)
    np.testing.assert_array_equal(present, full[:, :, -taps:])


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "function"])
@pytest.mark.parametrize(("heads", "width", "epsilon"), [(4, 8, 1e-5), (1, 64, 1e-2), (16, 2, 1e-6)])
def test_the_norm_of_heads(kernel, heads, width, epsilon) -> None:
    x = RNG.standard_normal((2, 3, heads * width)).astype(np.float32)
    scale = RNG.standard_normal(width).astype(np.float32)
    feeds = {"x": x, "scale": scale}
    (y,) = called(head_norm(width), feeds, 1, kernel=kernel, num_branches=heads, epsilon=epsilon)
    split = x.reshape(2, 3, heads, width)
    wanted = split / np.sqrt((split**2).mean(-1, keepdims=True) + epsilon) * scale
    np.testing.assert_allclose(y, wanted.reshape(x.shape), atol=1e-5)


@pytest.mark.parametrize("text", [{}, {"conv_bias": True}, {"conv_L_cache": 4}], ids=["plain", "biased", "kernel 4"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_decoder_by_kernels_and_by_functions(text, dtype, tmp_path) -> None:
    """The same numbers, fed in pieces."""
    reference = pytest.importorskip("reference")
    reference.save_tiny(reference.tiny_model(text=text), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "bundle", dtype=dtype)
    path = Bundle.open(tmp_path / "bundle").graphs(dtype)[1][DECODER.stem]
    model = onnx.load(str(path))
    assert {node.op_type for node in model.graph.node if node.domain == CONTRIB} >= {CONVOLUTION, HEAD_NORM}
    assert {function.name for function in model.functions} == {CONVOLUTION, HEAD_NORM}
    for part in (*model.graph.node, *model.functions):
        kind = "op_type" if isinstance(part, onnx.NodeProto) else "name"
        if getattr(part, kind) in (CONVOLUTION, HEAD_NORM):
            setattr(part, kind, f"Unknown{getattr(part, kind)}")
    onnx.save(model, str(tmp_path / "functions.onnx"))
    embeds = RNG.standard_normal((1, 40, 64)).astype(np.float32)
    sessions = [ort.InferenceSession(str(p)) for p in (path, tmp_path / "functions.onnx")]
    wanted = reference.decode(sessions[0], embeds, [40])
    for chunks in ([40], [33] + [1] * 7, [1, 2, 3, 34]):
        for session in sessions:
            got, atol = reference.decode(session, embeds, chunks), {"fp32": 1e-4, "fp16": 0.01}[dtype]
            np.testing.assert_allclose(got, wanted, atol=atol * np.abs(wanted).max())
