"""What a decoder graph is: read off its session once, when it is loaded, and passed around from then on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from lfm_runtime.decode.state import StateInput
from lfm_runtime.errors import GraphContractError
from lfm_runtime.formats.contract import CONV_WINDOW, NEXT_MASK, POSITIONS, TOP_IDS, TOP_LOGITS, present_name
from lfm_runtime.formats.onnx_file import operators

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


@dataclass(frozen=True)
class DecoderInfo:
    """Shapes and abilities of one decoder, as its graph shows them."""

    states: tuple[StateInput, ...]
    vocabulary: int
    hidden: int
    embeds_type: Any  # numpy's, of its input
    takes_positions: bool
    gives_few: bool
    """A step of a few tokens gives the logits of all of them, one of many those of the last. Of others only the last's
    are given, or all: that must be known before a step.
    """
    shares_kv: bool  # attention writes into its past: past and present may be one buffer
    gives_windows: bool  # and what convolutions have read, from which any state before can be had: see CONV_WINDOW
    top_tokens: int  # likeliest tokens that it gives out beside the logits; 0: none
    gives_mask: bool  # and the next step's attention mask

    @property
    def verifies(self) -> bool:
        """Whether speculative tokens can be taken back."""
        return self.shares_kv and self.gives_windows

    @staticmethod
    def of(session: ort.InferenceSession, path: Path) -> DecoderInfo:
        """Read off a session; `path`: of the graph as it was exported, whose operators are looked at.

        Raises:
            GraphContractError: a state without a successor or of no fixed size, or sizes that are not fixed.
        """
        inputs, outputs = ({v.name: v for v in values} for values in (session.get_inputs(), session.get_outputs()))
        states = tuple(_state_input(i) for n, i in inputs.items() if n.startswith(("past_conv.", "past_key_values.")))
        if missing := [s.name for s in states if present_name(s.name) not in outputs]:
            raise GraphContractError(
                f"{path}: no output for the next state of {', '.join(missing)}; export the graph again"
            )
        logits, embeds = outputs["logits"], inputs["inputs_embeds"]
        vocabulary, hidden = logits.shape[2], embeds.shape[2]
        if not (isinstance(vocabulary, int) and isinstance(hidden, int)):
            sizes = f"vocabulary and hidden size {vocabulary, hidden}"
            raise GraphContractError(f"{path}: {sizes} are not fixed in the graph; export it again")
        gives_few = logits.shape[1] == POSITIONS
        fp32_edges = (embeds.type, logits.type) == ("tensor(float)", "tensor(float)")
        in_place = fp32_edges and "position_ids" not in inputs and "GroupQueryAttention" in operators(path)
        return DecoderInfo(
            states,
            vocabulary,
            hidden,
            _NUMPY.get(embeds.type, np.float32),
            "position_ids" in inputs,
            gives_few,
            in_place and (gives_few or logits.shape[1] == 1),
            any(name.startswith(CONV_WINDOW) for name in outputs),
            int(outputs[TOP_LOGITS].shape[2]) if {TOP_LOGITS, TOP_IDS} <= outputs.keys() else 0,
            NEXT_MASK in outputs,
        )


def _state_input(graph_input: Any) -> StateInput:
    if graph_input.type not in _NUMPY:
        raise GraphContractError(
            f"state input {graph_input.name} is {graph_input.type}; float, float16 and int8 are supported"
        )
    shape = list(graph_input.shape)
    shape[0] = 1
    if not graph_input.name.startswith("past_conv."):
        shape[2] = 0
    if not all(isinstance(n, int) for n in shape):
        raise GraphContractError(
            f"state input {graph_input.name} has no fixed shape ({graph_input.shape}); export the graph again"
        )
    return StateInput(graph_input.name, tuple(shape), _NUMPY[graph_input.type])
