"""int8-static: the vision encoder with activation ranges fixed in the graph (QDQ), for engines that cannot choose them
at run time. The quantizer is onnxruntime's own.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
from lfm_runtime.formats.contract import VISION_ENCODER

from lfm_quantize.calibrate.blocks import Feeds
from lfm_quantize.graph import POSITION_TABLE, linears, open_graph, save
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.passes.standard import WithoutBranches
from lfm_quantize.recipe import matching
from lfm_quantize.run import Made, Run
from lfm_quantize.variant import NewGraph


def with_static_ranges(run: Run) -> Made:
    """The encoder with fixed ranges; the other graphs are those of int8, where the bundle has it."""
    feeds = [view.feeds() for sample in run.samples for view in (*sample.views, *sample.extra)]
    keep = matching(run.settings.keep, linears(run.source.vision))
    rest = run.files("int8" if "int8" in run.bundle.variants else run.source.variant)
    encoder = NewGraph(static_int8(run.source.vision, feeds, keep))
    return Made({**rest, VISION_ENCODER.stem: encoder}, {"kept_fp32": keep})


@contextmanager
def _without_advice() -> Iterator[None]:
    """onnxruntime's quantizer advises everybody to run its optimizer before, which renames what layers are found by."""

    def is_other(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)


def static_int8(vision: ir.Model, feeds: Sequence[Feeds], keep: Sequence[str]) -> ir.Model:
    """Weights int8 per output channel, activations int8 with one symmetric range a tensor.

    Args:
        vision: the fp32 vision encoder.
        feeds: its inputs for the calibration images.
        keep: products that stay fp32.
    """
    # Imported here: it wants more packages than the rest.
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._rest = iter(feeds)

        def get_next(self) -> Any:
            return next(self._rest, None)

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        plain = rewritten(vision, WithoutBranches())
        save(plain, source)
        model = onnx.load(str(source))
        interpolated = [str(n.name) for n in plain.graph if POSITION_TABLE in (v.name for v in n.inputs if v)]
        for linear in linears(plain).values():  # behind attention, which is not ONNX's own, it cannot tell types
            for name in (linear.input, str(linear.node.outputs[0].name)):
                model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        with _without_advice():
            quantize_static(
                model,
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[*interpolated, *keep],
                extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "MatMulConstBOnly": True},
                use_external_data_format=False,
            )
        made = open_graph(target)
        made.metadata_props.clear()  # the quantizer's
        return made
