"""What a decoder on the CPU remembers, in two forms.

Shared: past and present of each attention layer are one buffer (GroupQueryAttention writes in place), and two sets of
convolution states swap roles each step; nothing large is allocated or copied per token. Several sequences in the rows
of the same buffers: batch_state.py; on a GPU: device_state.py.
Concatenated: the plain past → present form, for graphs without GroupQueryAttention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lfm_runtime.decode.graphs import DecoderGraphs
from lfm_runtime.decode.state import Embeds, Mark, Snapshot
from lfm_runtime.formats.contract import CONV_INPUT, MANY_TOKENS, present_name

PREFILL_TOKENS = 8
"""From so many tokens a step is bound by arithmetic rather than by reading weights, and int8's decoder is faster than
int4's (measured: 37 ms against 34 for 8 tokens of a 450M, 24 against 27 for 4).
"""


class SharedState:
    """State in place, through prepared bindings that differ in which convolution buffers are read and which written."""

    def __init__(
        self,
        graphs: DecoderGraphs,
        capacity: int,
        after: Snapshot | None = None,
        room: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        """`room`: where keys and values lie, [1, kv heads, capacity, D] by state input; by default in arrays of its
        own.
        """
        self.length, self.capacity = 0, capacity
        self._graphs = graphs
        self._turn = 0  # which of each convolution's two buffers holds its state
        self._mask = np.ones((1, capacity), np.int64)
        self._logits = np.empty(
            (1, MANY_TOKENS - 1 if graphs.info.gives_few else 1, graphs.info.vocabulary), np.float32
        )
        self._read: dict[str, NDArray[Any]] = {}  # [1, tokens, H] by convolution, of the last `step_all`
        self._read_room: dict[str, NDArray[Any]] = {}
        self._buffers: dict[str, list[NDArray[Any]]] = {}
        for state in graphs.info.states:
            if state.is_conv:
                self._buffers[state.name] = [np.zeros(state.shape, state.dtype) for _ in range(2)]
            elif room:
                self._buffers[state.name] = [room[state.name]]
            else:
                # Pages of a fresh zero array cost nothing until they are written.
                self._buffers[state.name] = [np.zeros((*state.shape[:2], capacity, state.shape[3]), state.dtype)]
        self._bindings: dict[tuple[int, int, bool], list[ort.IOBinding]] = {}
        if after:
            self.length = after.length
            for name, array in after.values.items():
                target = self._buffers[name][0]
                (target if array.shape == target.shape else target[:, :, : after.length])[...] = array

    def step(self, embeds: Embeds) -> NDArray[np.float32]:
        """Implement State.step; the logits are a view that the next step overwrites."""
        logits: NDArray[np.float32] = self._run(embeds, verify=False)[-1]
        return logits

    def step_token(self, token: int) -> NDArray[np.float32]:
        """Implement State.step_token; returns all logits, as `step` does."""
        return self.step(self._graphs.embed([token]))

    def step_all(self, embeds: Embeds) -> NDArray[np.float32]:
        """As `step` for fewer than MANY_TOKENS tokens, but logits [S, vocabulary] of all; `keep` can then take back the
        last of them.
        """
        return self._run(embeds, verify=True)

    def keep(self, tokens: int) -> None:
        """Be as if the last step, a `step_all`, had fed only its first `tokens`."""
        for name, read in self._read.items():
            buffers = self._buffers[name.replace(CONV_INPUT, "past_conv.")]
            state, before = buffers[self._turn], buffers[1 - self._turn]
            fed, kernel = read.shape[1], state.shape[2]
            state[...] = np.concatenate([before[0], read[0, :tokens].T], axis=1)[:, -kernel:]
        self.length += tokens - fed

    def _run(self, embeds: Embeds, *, verify: bool) -> NDArray[np.float32]:
        """Run one step; return the logits [positions, vocabulary]."""
        sessions, tokens = self._graphs.load(), embeds.shape[1]
        many = tokens >= MANY_TOKENS
        # Speculative tokens are checked by the graph that would have generated them.
        reads = sessions.prefill is not None and tokens >= PREFILL_TOKENS and not verify
        session = sessions.prefill if reads and sessions.prefill else sessions.decoder
        positions = 1 if many or not self._graphs.info.gives_few else tokens
        binding = self._binding(session, positions, verify)[self._turn]
        if verify:
            self._read = self._room_for_read(tokens)
        self.length += tokens
        # OrtValues over numpy memory: a view costs microseconds and copies nothing.
        binding.bind_ortvalue_input("inputs_embeds", ort.OrtValue.ortvalue_from_numpy(embeds))
        binding.bind_ortvalue_input("attention_mask", ort.OrtValue.ortvalue_from_numpy(self._mask[:, : self.length]))
        session.run_with_iobinding(binding, self._graphs.many_options if many else None)
        self._turn = 1 - self._turn
        logits: NDArray[np.float32] = self._logits[0, :positions]
        return logits

    def mark(self) -> Mark:
        """Implement State.mark; the convolution states are copied."""
        return Mark(
            self.length,
            {s.name: self._buffers[s.name][self._turn].copy() for s in self._graphs.info.states if s.is_conv},
        )

    def rewind(self, mark: Mark) -> None:
        """Implement State.rewind; keys and values beyond the mark are not cleared, but no longer read."""
        self.length = mark.length
        for name, array in mark.convs.items():
            self._buffers[name][self._turn][...] = array

    def snapshot(self) -> Snapshot:
        """Implement State.snapshot; keys and values are the state's own."""
        attention = {
            s.name: self._buffers[s.name][0][:, :, : self.length] for s in self._graphs.info.states if not s.is_conv
        }
        return Snapshot(self.length, {**attention, **self.mark().convs})

    def unbind(self) -> None:
        """Drop the bindings, which hold the sessions; the next step binds anew."""
        self._bindings.clear()

    def _binding(self, session: ort.InferenceSession, positions: int, verify: bool) -> list[ort.IOBinding]:
        key = id(session), positions, verify
        if key not in self._bindings:
            self._bindings[key] = bind_turns(session, self._buffers, self._logits[:, :positions])
            for name, array in (self._room_for_read(positions) if verify else {}).items():
                value = ort.OrtValue.ortvalue_from_numpy(array)
                for binding in self._bindings[key]:
                    binding.bind_ortvalue_output(name, value)
        return self._bindings[key]

    def _room_for_read(self, tokens: int) -> dict[str, NDArray[Any]]:
        """[1, tokens, H] for each convolution: the same memory for any number of tokens."""
        if not self._read_room:
            for s in self._graphs.info.states:
                if s.is_conv:
                    room = np.empty((1, MANY_TOKENS - 1, s.shape[1]), s.dtype)
                    self._read_room[s.name.replace("past_conv.", CONV_INPUT)] = room
        return {name: room[:, :tokens] for name, room in self._read_room.items()}


def bind_turns(
    session: ort.InferenceSession, buffers: Mapping[str, list[NDArray[Any]]], logits: NDArray[np.float32]
) -> list[ort.IOBinding]:
    """Two bindings that differ in which convolution buffers are read and which written; attention's are both. They hold
    on to the arrays' OrtValues.
    """
    bindings = [session.io_binding(), session.io_binding()]
    for binding in bindings:
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
    for name, arrays in buffers.items():
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        for turn, binding in enumerate(bindings):
            binding.bind_ortvalue_input(name, values[turn % len(values)])
            binding.bind_ortvalue_output(present_name(name), values[(turn + 1) % len(values)])
    return bindings


class ConcatenatedState:
    """A state that each session run takes as past and replaces by its present outputs."""

    def __init__(self, graphs: DecoderGraphs, capacity: int, after: Snapshot | None = None) -> None:
        self.length, self.capacity = (after.length if after else 0), capacity
        self._graphs = graphs
        self._past: dict[str, NDArray[Any]] = {s.name: np.zeros(s.shape, s.dtype) for s in graphs.info.states}
        self._past |= after.values if after else {}
        self._outputs = ["logits", *(present_name(s.name) for s in graphs.info.states)]

    def step(self, embeds: Embeds) -> NDArray[np.float32]:
        """Implement State.step; the logits stay valid after the next step."""
        new = embeds.shape[1]
        feeds: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeds.astype(self._graphs.info.embeds_type, copy=False),
            "attention_mask": np.ones((1, self.length + new), self._graphs.info.mask_type),
            **self._graphs.info.constants,
            **self._past,
        }
        if kind := self._graphs.info.positions_type:
            feeds["position_ids"] = np.arange(self.length, self.length + new, dtype=kind)[None]
        logits, *present = self._graphs.load().decoder.run(self._outputs, feeds, self._graphs.uncaptured)
        self._past = dict(zip(self._past, present, strict=True))
        self.length += new
        return np.asarray(logits[0, -1], np.float32)

    def step_token(self, token: int) -> NDArray[np.float32]:
        """Implement State.step_token; returns all logits, as `step` does."""
        return self.step(self._graphs.embed([token]))

    def mark(self) -> Mark:
        """Implement State.mark; nothing is copied, since no step writes into these arrays."""
        return Mark(self.length, {s.name: self._past[s.name] for s in self._graphs.info.states if s.is_conv})

    def rewind(self, mark: Mark) -> None:
        """Implement State.rewind; attention's past is cut to the mark's length."""
        attention = {s.name: self._past[s.name][:, :, : mark.length] for s in self._graphs.info.states if not s.is_conv}
        self._past |= {**attention, **mark.convs}
        self.length = mark.length

    def snapshot(self) -> Snapshot:
        """Implement State.snapshot; nothing is copied."""
        return Snapshot(self.length, dict(self._past))  # each step makes new arrays: nobody writes into these
