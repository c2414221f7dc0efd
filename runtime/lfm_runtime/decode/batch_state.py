"""Several sequences of different lengths in one step: rows of the same buffers, each as long as it is.

The sequences that are decoded together are the first rows, without gaps, so that a step of two sequences costs two rows
however many there could be. A row beyond them belongs to a sequence that is still being read, by itself: its keys and
values are written where the batch will find them, and nothing is allocated for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lfm_runtime.decode.graphs import DecoderGraphs
from lfm_runtime.decode.state import Embeds, Mark, Snapshot
from lfm_runtime.decode.states import SharedState, bind_turns


class BatchState:
    """Rows of keys, values and convolution states. `lengths`: of the sequences in the first rows."""

    def __init__(self, graphs: DecoderGraphs, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.lengths: list[int] = []
        self._graphs = graphs
        self._turn = 0  # which of each convolution's two buffers holds the states
        self._logits = np.empty((rows, 1, graphs.info.vocabulary), np.float32)
        # Pages of a fresh zero array cost nothing until they are written.
        self._buffers = {
            s.name: [np.zeros((rows, *s.shape[1:]), s.dtype) for _ in range(2)]
            if s.is_conv
            else [np.zeros((rows, s.shape[1], capacity, s.shape[3]), s.dtype)]
            for s in graphs.info.states
        }
        self._bindings: dict[int, list[ort.IOBinding]] = {}

    def reading(self, row: int, after: Snapshot | None = None) -> SharedState:
        """A sequence by itself whose keys and values lie in `row`, which no other uses; fresh, or where a snapshot was
        taken. Steps of the batch do not disturb it.
        """
        room = {name: buffers[0][row : row + 1] for name, buffers in self._buffers.items() if len(buffers) == 1}
        return SharedState(self._graphs, self.capacity, after, room)

    def join(self, row: int, state: SharedState) -> None:
        """Decode a sequence that was read in `row` together with the others from now on, in the row after theirs."""
        at, convs = len(self.lengths), state.mark().convs
        for name, buffers in self._buffers.items():
            if len(buffers) == 2:
                buffers[self._turn][at] = convs[name][0]
            elif row != at:
                buffers[0][at, :, : state.length] = buffers[0][row, :, : state.length]
        self.lengths.append(state.length)

    def leave(self, row: int) -> None:
        """End a sequence; the last one takes its row."""
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        if row == last:
            return
        for buffers in self._buffers.values():
            of = buffers[self._turn % len(buffers)]
            if len(buffers) == 2:
                of[row] = of[last]
            else:
                of[row, :, :length] = of[last, :, :length]
        self.lengths[row] = length

    def moved(self, capacity: int) -> BatchState:
        """The same sequences with room for more tokens each. Those being read are left behind."""
        other = BatchState(self._graphs, self.rows, capacity)
        other.lengths = list(self.lengths)
        for name, buffers in self._buffers.items():
            old, new = buffers[self._turn % len(buffers)], other._buffers[name][0]
            for row, length in enumerate(self.lengths):
                if len(buffers) == 2:
                    new[row] = old[row]
                else:
                    new[row, :, :length] = old[row, :, :length]
        return other

    def step(self, embeds: Embeds) -> NDArray[np.float32]:
        """Feed one token to every sequence, embeds [sequences, 1, H]; returns logits [sequences, vocabulary], valid
        until the next step.
        """
        session, count = self._graphs.load().decoder, len(self.lengths)
        if count not in self._bindings:
            first: dict[str, list[NDArray[Any]]] = {n: [b[:count] for b in of] for n, of in self._buffers.items()}
            self._bindings[count] = bind_turns(session, first, self._logits[:count])
        binding = self._bindings[count][self._turn]
        mask = (np.arange(max(self.lengths) + 1) <= np.array(self.lengths)[:, None]).astype(np.int64)
        binding.bind_ortvalue_input("inputs_embeds", ort.OrtValue.ortvalue_from_numpy(embeds))
        binding.bind_ortvalue_input("attention_mask", ort.OrtValue.ortvalue_from_numpy(mask))
        session.run_with_iobinding(binding)
        self._turn = 1 - self._turn
        self.lengths = [n + 1 for n in self.lengths]
        logits: NDArray[np.float32] = self._logits[:count, 0]
        return logits

    def step_row(self, row: int, embeds: Embeds) -> None:
        """Feed several tokens, embeds [1, S, H], to one sequence alone."""
        convs = {name: of[self._turn][row : row + 1] for name, of in self._buffers.items() if len(of) == 2}
        alone = self.reading(row)
        alone.rewind(Mark(self.lengths[row], convs))
        alone.step(embeds)
        for name, conv in alone.mark().convs.items():
            convs[name][...] = conv
        self.lengths[row] = alone.length


@dataclass(frozen=True)
class Row:
    """A row of a batch, as a Context begins its states."""

    batch: BatchState
    index: int

    @property
    def longest(self) -> int:
        """Tokens that a row has room for."""
        return self.batch.capacity

    def start(self, capacity: int, after: Snapshot | None = None) -> SharedState:
        """Return the state of a sequence by itself in this row, whose capacity is the row's."""
        assert capacity <= self.batch.capacity
        return self.batch.reading(self.index, after)
