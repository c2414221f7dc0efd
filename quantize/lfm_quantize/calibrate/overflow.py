"""Which nodes of an fp32 graph would leave fp16's range."""

from __future__ import annotations

import numpy as np

from lfm_quantize.calibrate.blocks import FedGraph, Values, blocks_of
from lfm_quantize.graph import FLOAT, Array, constant, nodes_between, reads

LARGEST = 60_000.0
"""Magnitude above which a value counts as out of fp16's range (65,504), with a little room for other images."""


def overflowing(fed: FedGraph) -> list[str]:
    """Nodes with a value, or a constant, beyond fp16's range on these samples."""
    constants = fed.model.graph.initializers
    large = {
        name
        for name, value in constants.items()
        if value.const_value is not None and value.const_value.dtype == FLOAT and _largest(constant(value)) > LARGEST
    }
    states = fed.start()

    def note(_: int, values: Values) -> None:
        for name, v in values.items():
            # Up to onnxruntime 1.23 there is no value of an optional output that nobody reads.
            if v is not None and v.dtype == np.float32 and _largest(v) > LARGEST:
                large.add(name)

    for block in blocks_of(fed.model) if fed.feeds else []:
        inside = nodes_between(fed.model, block.outputs, block.cut)
        states = fed.run(block, states, [str(v.name) for n in inside for v in n.outputs if v.name], note)
    return [str(n.name) for n in fed.model.graph if large.intersection(v.name for v in (*reads(n), *n.outputs))]


def _largest(values: Array) -> float:
    found = np.abs(values).max() if values.size else 0.0
    return float(found) if np.isfinite(found) else float("inf")
