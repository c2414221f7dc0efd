"""The decode loop on a device with memory of its own. Keys, values, convolution states, embeddings, mask and logits
stay there: a token goes in, the likeliest ids and their logits come out.

Buffers have fixed addresses for a capacity, so that a step can be captured once as a CUDA graph and replayed: two of
them, because two sets of convolution states swap roles (see states.SharedState). The mask of such a step has the
capacity's length, ones first; the graph itself gives out the next one. Buffers of an answer that is over serve the
next. CUDA graphs belong to the thread that captured
them: a model is to be used from one.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lfm_runtime.decode.graphs import DecoderGraphs
from lfm_runtime.decode.sampling import Top
from lfm_runtime.decode.state import Embeds, Mark, Snapshot
from lfm_runtime.formats.contract import MANY_TOKENS, NEXT_MASK, TOP_IDS, TOP_LOGITS, present_name

Value = Any
"""ort.OrtValue, which has no types."""
_KEPT = 2
"""Buffers of answers that are over, each as large as a context, that are kept."""
_SMALLEST = 1024
"""Tokens of the smallest buffers: one view, a question and an answer. Larger ones double, so that few are ever made and
captured.
"""


class Memory(Protocol):
    """Where the tensors of a decode loop lie."""

    def place(self, array: NDArray[Any]) -> Value:
        """Return a copy of `array` in that memory."""
        ...

    def write(self, value: Value, array: NDArray[Any]) -> None:
        """Overwrite `value` with `array`, at the same address."""
        ...

    def read(self, value: Value) -> NDArray[Any]:
        """Return a copy of `value` in this process's memory."""
        ...


class OrtMemory:
    """Memory of a device that onnxruntime's Python can allocate on: cuda, cpu."""

    def __init__(self, device: str) -> None:
        self._device = device

    def place(self, array: NDArray[Any]) -> Value:
        """Implement Memory.place with a new OrtValue on the device."""
        return ort.OrtValue.ortvalue_from_numpy(np.array(array, order="C"), self._device, 0)

    def write(self, value: Value, array: NDArray[Any]) -> None:
        """Implement Memory.write with OrtValue.update_inplace."""
        value.update_inplace(np.ascontiguousarray(array))

    def read(self, value: Value) -> NDArray[Any]:
        """Implement Memory.read with a new numpy array."""
        return np.array(value.numpy())


class Buffers:
    """All that a state of one capacity keeps on the device, and the two bindings of a step of one token."""

    def __init__(self, loop: DeviceLoop, capacity: int) -> None:
        info, place = loop.info, loop.memory.place
        self.capacity = capacity
        self.states = {
            s.name: [place(np.zeros(s.shape, s.dtype)) for _ in range(2)]
            if s.is_conv
            else [place(np.zeros((*s.shape[:2], capacity, s.shape[3]), s.dtype))]
            for s in info.states
        }
        self.masks = [place(np.zeros((1, capacity), np.int64)) for _ in range(2)]
        self.logits = place(np.zeros((1, 1, info.vocabulary), np.float32))
        count = info.top_tokens
        self.top = (
            (place(np.zeros((1, 1, count), np.float32)), place(np.zeros((1, 1, count), np.int64))) if count else None
        )
        self._steps = (
            [(self._bound(loop, turn, self.masks[turn]), loop.captured()) for turn in range(2)] if loop.is_fixed else []
        )

    def step(self, loop: DeviceLoop, turn: int, length: int) -> tuple[ort.IOBinding, ort.RunOptions]:
        """What a step of one token after `length` others is run with."""
        if self._steps:
            return self._steps[turn]
        # CUDA's attention goes by a mask's sum; others', WebGPU's for one, by its length. Held here: a binding does not
        # hold what is bound.
        self._mask = loop.memory.place(np.ones((1, length + 1), np.int64))
        return self._bound(loop, turn, self._mask), loop.graphs.uncaptured

    def bind_states(self, binding: ort.IOBinding, turn: int) -> None:
        """Read one of each convolution's states and write the other; attention's are both at once."""
        for name, values in self.states.items():
            binding.bind_ortvalue_input(name, values[turn % len(values)])
            binding.bind_ortvalue_output(present_name(name), values[(turn + 1) % len(values)])

    def _bound(self, loop: DeviceLoop, turn: int, mask: Value) -> ort.IOBinding:
        binding = loop.sessions.decoder.io_binding()
        binding.bind_ortvalue_input("inputs_embeds", loop.embeds)
        binding.bind_ortvalue_input("attention_mask", mask)
        binding.bind_ortvalue_output("logits", self.logits)
        if self.top:
            binding.bind_ortvalue_output(TOP_LOGITS, self.top[0])
            binding.bind_ortvalue_output(TOP_IDS, self.top[1])
        if loop.info.gives_mask and loop.is_fixed:
            binding.bind_ortvalue_output(NEXT_MASK, self.masks[1 - turn])
        self.bind_states(binding, turn)
        return binding


class DeviceLoop:
    """What all states of a decoder share on its device: the token that is fed, its embedding, and buffers that are
    free.
    """

    def __init__(self, graphs: DecoderGraphs, memory: Memory, longest: int) -> None:
        """`longest`: tokens that the decoder has positions for; 0: not known."""
        self.graphs, self.memory, self.longest = graphs, memory, longest
        self.sessions, self.info = graphs.load(), graphs.info
        # Binding an input that an operator on the CPU reads copies it there and then: it must be bound anew whenever it
        # has changed.
        self.is_fixed = self.sessions.all_on_device
        self.token = memory.place(np.zeros((1, 1), np.int64))
        self.embeds = memory.place(np.zeros((1, 1, self.info.hidden), np.float32))
        self._free: list[Buffers] = []
        self._captured = 0
        self._look_up = (self._bound_look_up(), self.captured()) if self.is_fixed else None

    def captured(self) -> ort.RunOptions:
        """For a run with fixed addresses: each has a CUDA graph of its own. Providers without CUDA graphs ignore it."""
        self._captured += 1
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._captured))
        return options

    def look_up(self, token: int) -> None:
        """Write the embedding of `token` to `embeds`, on the device."""
        self.memory.write(self.token, np.array([[token]], np.int64))
        binding, options = self._look_up or (self._bound_look_up(), self.graphs.uncaptured)
        self.sessions.embed.run_with_iobinding(binding, options)

    def _bound_look_up(self) -> ort.IOBinding:
        binding = self.sessions.embed.io_binding()
        binding.bind_ortvalue_input("input_ids", self.token)
        binding.bind_ortvalue_output("inputs_embeds", self.embeds)
        return binding

    def take(self, capacity: int) -> Buffers:
        """Buffers for a state, at least so large, which gives them back when it is over. New ones are captured anew,
        and what was captured of others stays with the session.
        """
        found = next((b for b in sorted(self._free, key=lambda b: b.capacity) if b.capacity >= capacity), None)
        if found is None:
            self._free = []  # they are smaller, and their memory is wanted
            roomy = max(_SMALLEST, 1 << (capacity - 1).bit_length())
            return Buffers(self, max(capacity, min(roomy, self.longest or roomy)))
        self._free.remove(found)
        return found

    def give_back(self, buffers: Buffers) -> None:
        """For the next state of their capacity; the oldest of too many are let go."""
        self._free = [*self._free, buffers][-_KEPT:]


class DeviceState:
    """A state whose tensors stay on the device; implements state.State."""

    def __init__(self, loop: DeviceLoop, capacity: int, after: Snapshot | None = None) -> None:
        self._loop, self._buffers = loop, loop.take(capacity)
        self.length, self.capacity = 0, self._buffers.capacity
        weakref.finalize(self, loop.give_back, self._buffers).atexit = False
        self._turn = 0  # which of each convolution's two buffers holds its state
        self._mask_for = -1  # length that the mask of this turn is for
        convs = {s.name: np.zeros(s.shape, s.dtype) for s in loop.info.states if s.is_conv}
        self._write({**convs, **(after.values if after else {})})
        self.length = after.length if after else 0

    def step(self, embeds: Embeds) -> NDArray[np.float32]:
        """Implement State.step; the logits are copied to the host."""
        loop, memory, tokens = self._loop, self._loop.memory, embeds.shape[1]
        positions = 1 if tokens >= MANY_TOKENS or not loop.info.gives_few else tokens
        logits = (
            self._buffers.logits
            if positions == 1
            else memory.place(np.zeros((1, positions, loop.info.vocabulary), np.float32))
        )
        binding = loop.sessions.decoder.io_binding()
        inputs = {"inputs_embeds": embeds, "attention_mask": np.ones((1, self.length + tokens), np.int64)}
        held = {name: memory.place(array) for name, array in inputs.items()}  # until the run is over
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("logits", logits)
        self._buffers.bind_states(binding, self._turn)
        loop.sessions.decoder.run_with_iobinding(binding, loop.graphs.uncaptured)
        self.length += tokens
        self._turn = 1 - self._turn
        self._mask_for = -1
        last: NDArray[np.float32] = memory.read(logits)[0, -1]
        return last

    def step_token(self, token: int) -> NDArray[np.float32] | Top:
        """Implement State.step_token; returns Top where the decoder has outputs for it."""
        loop, buffers = self._loop, self._buffers
        if loop.is_fixed and self._mask_for != self.length + 1:
            loop.memory.write(
                buffers.masks[self._turn], (np.arange(self.capacity) <= self.length).astype(np.int64)[None]
            )
        loop.look_up(token)
        binding, options = buffers.step(loop, self._turn, self.length)
        loop.sessions.decoder.run_with_iobinding(binding, options)
        self.length += 1
        self._turn = 1 - self._turn
        self._mask_for = self.length + 1 if loop.info.gives_mask else -1
        if not buffers.top:
            return self._row()
        logits, ids = (loop.memory.read(value)[0, 0] for value in buffers.top)
        return Top(logits, ids, self._row)

    def _row(self) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self._loop.memory.read(self._buffers.logits)[0, 0]
        return row

    def mark(self) -> Mark:
        """Implement State.mark; the convolution states are copied to the host."""
        return Mark(self.length, self._read())

    def rewind(self, mark: Mark) -> None:
        """Implement State.rewind; the mark's convolution states are copied to the device."""
        self._write(mark.convs)
        self.length, self._mask_for = mark.length, -1

    def snapshot(self) -> Snapshot:
        """Implement State.snapshot; all states are copied to the host."""
        return Snapshot(self.length, self._read(attention=True))

    def _read(self, *, attention: bool = False) -> dict[str, NDArray[Any]]:
        """Return the convolution states, and attention's if asked for, by input name."""
        found = {}
        for state in self._loop.info.states:
            if state.is_conv:
                found[state.name] = self._loop.memory.read(self._buffers.states[state.name][self._turn])
            elif attention:
                found[state.name] = self._loop.memory.read(self._buffers.states[state.name][0])[
                    :, :, : self.length
                ].copy()
        return found

    def _write(self, values: Mapping[str, NDArray[Any]]) -> None:
        for name, array in values.items():
            held = self._buffers.states[name]
            if len(held) == 1:
                whole = np.zeros((*array.shape[:2], self.capacity, array.shape[3]), array.dtype)
                whole[:, :, : array.shape[2]] = array
                self._loop.memory.write(held[0], whole)
            else:
                self._loop.memory.write(held[self._turn], array)
