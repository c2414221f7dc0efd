"""The vision encoder with activation ranges fixed in the graph (QDQ): some engines cannot choose them at run time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from lfm_quantize.calibrate.blocks import Feeds
from lfm_quantize.graph import Graph

EXCLUDED = ("vision.positions",)


def _without_branches(graph: Graph) -> Graph:
    """Attention as for unpadded views, which is how the runtime runs them: engines with fixed graphs take no If."""
    nodes = {}
    for node in graph.nodes:
        if node.op_type == "If":
            branch = next(a.g for a in node.attribute if a.name == "then_branch")
            inner = [onnx.NodeProto.FromString(n.SerializeToString()) for n in branch.node]
            for n in inner:
                n.output[:] = [node.output[0] if name == branch.output[0].name else name for name in n.output]
            nodes[node.name] = inner
    return graph.replaced(nodes, {})


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._rest = iter(feeds)

    def get_next(self) -> Any:
        return next(self._rest, None)


def static_int8(graph: Graph, feeds: Sequence[Feeds], keep: Sequence[str]) -> Graph:
    """Weights int8 per output channel, activations int8 with one symmetric range a tensor, from onnxruntime's own
    quantizer.

    Args:
        graph: the fp32 vision encoder.
        feeds: its inputs for the calibration images.
        keep: products that stay fp32.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        graph = _without_branches(graph)
        graph.save(source)
        model = onnx.load(str(source))
        for (
            linear
        ) in graph.linears().values():  # behind attention, which is not ONNX's own, the quantizer cannot tell types
            for name in (linear.node.input[0], linear.node.output[0]):
                model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        quantize_static(
            model,
            str(target),
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*EXCLUDED, *keep],
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
            use_external_data_format=False,
        )
        return Graph.open(target)
