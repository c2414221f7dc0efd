"""The decode loop's engine room: token embeddings in, logits out, state carried from step to step.

Two forms of state. Shared: past and present of each attention layer are one buffer (GroupQueryAttention writes in place), and
two sets of convolution states swap roles each step; nothing large is allocated or copied per token. Concatenated: the plain
past → present form, for graphs without GroupQueryAttention.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lfm_runtime.contract import present_name
from lfm_runtime.errors import GraphContractError

Embeds = NDArray[np.float32]
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class State(Protocol):
    """Everything remembered of the tokens so far."""

    length: int

    def step(self, embeds: Embeds) -> NDArray[np.float32]:
        """Feed embeds [1, S, H]; returns the logits [vocabulary] of the last position, valid until the next step."""
        ...


@dataclass(frozen=True)
class StateInput:
    """One state input of the decoder, as probed from the graph."""

    name: str
    shape: tuple[int, ...]  # with 0 where the past length goes
    dtype: Any

    @property
    def is_conv(self) -> bool:
        """Of a convolution, or else of an attention layer."""
        return self.name.startswith("past_conv.")


class Decoder:
    """The decoder and embedding graphs of one model."""

    def __init__(self, decoder: ort.InferenceSession, embed: ort.InferenceSession, path: Path) -> None:
        self.session = decoder
        self.embed_session = embed
        self.inputs = {i.name: i for i in decoder.get_inputs()}
        self.states = [_probe(i) for i in decoder.get_inputs() if i.name.startswith(("past_conv.", "past_key_values."))]
        outputs = {o.name: o for o in decoder.get_outputs()}
        if missing := [s.name for s in self.states if present_name(s.name) not in outputs]:
            raise GraphContractError(f"{path}: no output carries on {', '.join(missing)}; export the graph again")
        sizes = outputs["logits"].shape[2], self.inputs["inputs_embeds"].shape[2]
        if not all(isinstance(size, int) for size in sizes):
            raise GraphContractError(f"{path}: vocabulary and hidden size {sizes} are not fixed in the graph; export it again")
        self.vocabulary, self.hidden = sizes
        self.embeds_type = _NUMPY.get(self.inputs["inputs_embeds"].type, np.float32)
        # Sharing needs an operator that writes into its past; its name is in the protobuf or it is not there.
        fp32_edges = self.embeds_type is np.float32 and outputs["logits"].type == "tensor(float)"
        self.shares_kv = fp32_edges and b"GroupQueryAttention" in path.read_bytes() and "position_ids" not in self.inputs
        self._last_only = outputs["logits"].shape[1] == 1

    def embed(self, ids: list[int]) -> Embeds:
        """Embeddings [1, tokens, H]."""
        (embeds,) = self.embed_session.run(["inputs_embeds"], {"input_ids": np.array([ids], np.int64)})
        return np.asarray(embeds, np.float32)

    def embed_prompt(self, ids: list[int], features: NDArray[np.float32], image_id: int) -> Embeds:
        """Embeddings [1, tokens, H] with image features [image tokens, H] in the image tokens' places."""
        embeds = self.embed(ids)
        if len(features):
            embeds[0, np.array(ids) == image_id] = features
        return embeds

    def start(self, capacity: int) -> State:
        """Fresh state for at most `capacity` tokens, prompt and answer together."""
        return SharedState(self, capacity) if self.shares_kv and self._last_only else ConcatenatedState(self)


def _probe(graph_input: Any) -> StateInput:
    if graph_input.type not in _NUMPY:
        raise GraphContractError(f"state input {graph_input.name} is {graph_input.type}; float and float16 are supported")
    shape = list(graph_input.shape)
    shape[0] = 1
    if not graph_input.name.startswith("past_conv."):
        shape[2] = 0
    if not all(isinstance(n, int) for n in shape):
        raise GraphContractError(f"state input {graph_input.name} has no fixed shape ({graph_input.shape}); export the graph again")
    return StateInput(graph_input.name, tuple(shape), _NUMPY[graph_input.type])


class SharedState:
    """State in place, through two prepared bindings that differ in which convolution buffers are read and which written."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        self.length = 0
        self._session = decoder.session
        self._mask = np.ones((1, capacity), np.int64)
        self._logits = np.empty((1, 1, decoder.vocabulary), np.float32)
        self._bindings = [self._session.io_binding(), self._session.io_binding()]
        logits = ort.OrtValue.ortvalue_from_numpy(self._logits)
        self._keep: list[ort.OrtValue] = [logits]
        for binding in self._bindings:
            binding.bind_ortvalue_output("logits", logits)
        for state in decoder.states:
            if state.is_conv:
                buffers = [np.zeros(state.shape, state.dtype) for _ in range(2)]
            else:
                shape = (*state.shape[:2], capacity, state.shape[3])
                buffers = [np.zeros(shape, state.dtype)] * 2
            values = [ort.OrtValue.ortvalue_from_numpy(b) for b in buffers]
            self._keep += values
            for turn, binding in enumerate(self._bindings):
                binding.bind_ortvalue_input(state.name, values[turn])
                binding.bind_ortvalue_output(present_name(state.name), values[turn - 1] if state.is_conv else values[turn])
        self._turn = 0

    def step(self, embeds: Embeds) -> NDArray[np.float32]:
        """See State."""
        binding = self._bindings[self._turn]
        self._turn = 1 - self._turn
        self.length += embeds.shape[1]
        # OrtValues over numpy memory: a view costs microseconds and copies nothing.
        binding.bind_ortvalue_input("inputs_embeds", ort.OrtValue.ortvalue_from_numpy(embeds))
        binding.bind_ortvalue_input("attention_mask", ort.OrtValue.ortvalue_from_numpy(self._mask[:, : self.length]))
        self._session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = self._logits[0, 0]
        return logits


class ConcatenatedState:
    """Past in, present out, through plain session runs."""

    def __init__(self, decoder: Decoder) -> None:
        self.length = 0
        self._decoder = decoder
        self._past: dict[str, NDArray[Any]] = {s.name: np.zeros(s.shape, s.dtype) for s in decoder.states}
        self._outputs = ["logits", *(present_name(s.name) for s in decoder.states)]

    def step(self, embeds: Embeds) -> NDArray[np.float32]:
        """See State."""
        new = embeds.shape[1]
        feeds: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeds.astype(self._decoder.embeds_type, copy=False),
            "attention_mask": np.ones((1, self.length + new), np.int64),
            **self._past,
        }
        if "position_ids" in self._decoder.inputs:
            feeds["position_ids"] = np.arange(self.length, self.length + new, dtype=np.int64)[None]
        logits, *present = self._decoder.session.run(self._outputs, feeds)
        self._past = dict(zip(self._past, present, strict=True))
        self.length += new
        return np.asarray(logits[0, -1], np.float32)
