"""Inputs and outputs as a graph declares them: published graphs differ in types, and in the name of their one output.

A session here is anything with onnxruntime's `get_inputs` and `get_outputs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm_runtime.errors import BundleError, GraphContractError

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


def check_patches(session: Any, patches: NDArray[np.float32]) -> None:
    """Raise BundleError where the image settings cut patches (views, patches, values) of a size the encoder lacks."""
    size = next((i.shape[-1] for i in session.get_inputs() if i.name == "pixel_values"), None)
    if isinstance(size, int) and size != patches.shape[-1]:
        raise BundleError(
            f"the encoder takes patches of {size} values, the image settings make {patches.shape[-1]}; "
            "correct encoder_patch_size in preprocessor_config.json"
        )


def image_features(found: NDArray[Any], tokens: int) -> NDArray[np.float32]:
    """Return the encoder's output as fp32 (tokens, width); raises BundleError where it has another number of tokens."""
    features = np.asarray(found, np.float32).reshape(-1, found.shape[-1])
    if len(features) != tokens:
        raise BundleError(
            f"the encoder gives {len(features)} image tokens where the image settings count {tokens}; "
            "correct downsample_factor in preprocessor_config.json"
        )
    return features
