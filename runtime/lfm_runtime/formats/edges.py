"""Inputs and outputs as a graph declares them: published graphs differ in types, and in the name of their one output.

A session here is anything with onnxruntime's `get_inputs` and `get_outputs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm_runtime.errors import GraphContractError

_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


def numpy_type(value: Any) -> Any:
    """Return numpy's type of a graph's input or output; raises GraphContractError for one that numpy lacks."""
    if value.type not in _NUMPY:
        known = ", ".join(name[7:-1] for name in _NUMPY)
        raise GraphContractError(
            f"the graph's {value.name} is {value.type[7:-1]}; allowed: {known}; take another variant"
        )
    return _NUMPY[value.type]


def fed(session: Any, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return those of `values` that a graph takes, in the types that it declares."""
    wanted = {i.name: numpy_type(i) for i in session.get_inputs() if i.name in values}
    return {name: np.asarray(values[name]).astype(kind, copy=False) for name, kind in wanted.items()}
