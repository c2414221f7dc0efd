"""Small graphs for tests of passes: written as text, run by onnxruntime."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from lfm_quantize.graph import session
from onnx import numpy_helper

HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'


def model_of(text: str, **constants: np.ndarray) -> ir.Model:
    """A graph in ONNX's text form, with these constants."""
    proto = onnx.parser.parse_model(f"{HEADER}\n{text}")
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    model = ir.serde.from_proto(proto)
    for value in model.graph.initializers.values():
        value.type = value.shape = None
    return model


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    """All outputs."""
    return session(model, 1).run(None, feeds)


def kinds(model: ir.Model) -> Counter[str]:
    """How many nodes of each operator."""
    return Counter(node.op_type for node in model.graph)


def constants(model: ir.Model) -> dict[str, np.ndarray]:
    """By name; 4-bit ones as stored."""
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def stored(model: ir.Model, name: str) -> bytes:
    """A constant's bytes as they are written."""
    return model.graph.initializers[name].const_value.tobytes()


def text_of(model: ir.Model) -> str:
    """The whole graph, to compare with another."""
    return onnx.printer.to_text(ir.serde.to_proto(model))
