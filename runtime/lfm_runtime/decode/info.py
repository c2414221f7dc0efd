"""What a decoder graph is: read off its session once, when it is loaded, and passed around from then on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lfm_runtime.decode.state import StateInput
from lfm_runtime.errors import GraphContractError
from lfm_runtime.formats.contract import (
    CONV_INPUT,
    NEXT_MASK,
    NUM_LOGITS,
    POSITIONS,
    TOP_IDS,
    TOP_LOGITS,
    is_conv,
    is_past,
    present_name,
)
from lfm_runtime.formats.edges import numpy_type
from lfm_runtime.formats.manifest import ModelFacts
from lfm_runtime.formats.onnx_file import edges_of

_STATES = ("tensor(float)", "tensor(float16)", "tensor(int8)")


@dataclass(frozen=True)
class DecoderInfo:
    """Shapes and abilities of one decoder, as its graph shows them."""

    states: tuple[StateInput, ...]
    vocabulary: int
    hidden: int
    embeds_type: Any  # numpy's, of its input
    mask_type: Any  # numpy's, of attention_mask
    positions_type: Any  # numpy's, of position_ids; None: there is no such input
    constants: Mapping[str, NDArray[Any]]  # further inputs, the same at each step
    gives_few: bool
    """A step of a few tokens gives the logits of all of them, one of many those of the last. Of others only the last's
    are given, or all: that must be known before a step.
    """
    shares_kv: bool  # attention writes into its past: past and present may be one buffer
    gives_conv_inputs: bool  # and what convolutions have read, from which any state before can be had: see CONV_INPUT
    top_tokens: int  # likeliest tokens that it gives out beside the logits; 0: none
    gives_mask: bool  # and the next step's attention mask

    @property
    def verifies(self) -> bool:
        """Whether speculative tokens can be taken back."""
        return self.shares_kv and self.gives_conv_inputs

    @staticmethod
    def of(session: ort.InferenceSession, path: Path, facts: ModelFacts | None = None) -> DecoderInfo:
        """Read off a session.

        Args:
            session: of the decoder.
            path: of the graph as it was exported, whose operators are looked at.
            facts: sizes that a graph may leave open.

        Raises:
            GraphContractError: a state without a successor, an input of an unknown type, or a size that nothing tells.
        """
        inputs, outputs = ({v.name: v for v in values} for values in (session.get_inputs(), session.get_outputs()))
        states = tuple(_state_input(i, facts) for n, i in inputs.items() if is_past(n))
        if missing := [s.name for s in states if present_name(s.name) not in outputs]:
            raise GraphContractError(
                f"{path}: no output for the next state of {', '.join(missing)}; export the graph again"
            )
        logits, embeds = outputs["logits"], inputs["inputs_embeds"]
        vocabulary = _size(logits, 2, facts, "vocabulary")
        hidden = _size(embeds, 2, facts, "hidden")
        gives_few = logits.shape[1] == POSITIONS
        fp32_edges = (embeds.type, logits.type) == ("tensor(float)", "tensor(float)")
        mask_type, positions = numpy_type(inputs["attention_mask"]), inputs.get("position_ids")
        constants = {n: _one_of(inputs[n]) for n in (NUM_LOGITS,) if n in inputs}
        plain = fp32_edges and mask_type is np.int64 and positions is None and not constants
        kept = {name for s in states if not s.is_conv for name in (s.name, present_name(s.name))}
        in_place = plain and bool(kept) and kept <= edges_of(path, "GroupQueryAttention")  # and no cast between
        return DecoderInfo(
            states,
            vocabulary,
            hidden,
            numpy_type(embeds),
            mask_type,
            positions and numpy_type(positions),
            constants,
            gives_few,
            in_place and (gives_few or logits.shape[1] == 1),
            any(name.startswith(CONV_INPUT) for name in outputs),
            int(outputs[TOP_LOGITS].shape[2]) if {TOP_LOGITS, TOP_IDS} <= outputs.keys() else 0,
            NEXT_MASK in outputs,
        )


def _size(value: Any, axis: int, facts: ModelFacts | None, name: str) -> int:
    """Size of an axis: the graph's, or where it is a symbol there, what is known of the model."""
    size = value.shape[axis]
    if not isinstance(size, int):
        size = getattr(facts, name, None)
    if size is None:
        raise GraphContractError(
            f"the graph leaves axis {axis} of {value.name} open ({value.shape}), and config.json does not tell it; "
            "copy config.json from the checkpoint"
        )
    return int(size)


def _one_of(value: Any) -> NDArray[Any]:
    """1 as an input declares it: a scalar, or a list of one."""
    return np.ones([1] * len(value.shape), numpy_type(value))


def _state_input(graph_input: Any, facts: ModelFacts | None) -> StateInput:
    if graph_input.type not in _STATES:
        raise GraphContractError(
            f"state input {graph_input.name} is {graph_input.type}; float, float16 and int8 are supported"
        )
    if is_conv(graph_input.name):
        rest = [_size(graph_input, 1, facts, "hidden"), _size(graph_input, 2, facts, "conv_kernel")]
    else:
        heads = _size(graph_input, 1, facts, "kv_heads")
        rest = [heads, 0, _size(graph_input, 3, facts, "head_dim")]
    return StateInput(graph_input.name, (1, *rest), numpy_type(graph_input))
